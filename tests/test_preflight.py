"""Each pre-flight rule refuses a setup that fails or trains incorrectly without the rule; its suggestion passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule
from preflight_cases import CASES, EVERY_CASE, NO_REPRODUCTION
from preflight_cases.setting import (
    CONTEXT_PARALLEL,
    EXPERTS,
    PIPELINE,
    PREDICTING,
    TENSOR_PARALLEL,
    TORCH_FSDP2,
    VOCAB,
    Case,
    Setting,
    connections,
    megatron_fsdp,
    on_gpu,
)
from ranks import RankError, run_ranks

from bridge.dist import Layout, create_process_groups, destroy_process_groups
from bridge.dist.checks import preflight, rules
from bridge.dist.checks.preflight import Environment
from bridge.dist.checks.rules import layers, machine, process_groups
from bridge.dist.engine import build
from bridge.dist.engine.weights import draw_weights
from bridge.dist.engine.wrap import data_parallel
from bridge.dist.errors import PreflightError
from bridge.dist.job import make_builder
from bridge.dist.train.step import TrainOptions, train
from bridge.dist.train.text import Text, find_default_text
from bridge.models.gpt import GPTModelBuilder, GPTModelConfig
from bridge.models.mamba import MambaModelBuilder
from bridge.models.t5 import T5ModelBuilder

FAMILIES = (GPTModelBuilder, MambaModelBuilder, T5ModelBuilder)
"""The builders that have rules of their own."""
TRAINING = TrainOptions(steps=2, text=find_default_text(), seq_length=16, global_batch_size=4)


def list_rules() -> list[preflight.Rule]:
    found = [*rules.RULES, *(rule for family in FAMILIES for rule in family.rules)]
    return list(dict.fromkeys(found))  # some rules belong to several families


def test_every_rule_has_a_case() -> None:
    assert sorted(CASES) == sorted(rule.name for rule in list_rules() if rule.no_reproduction is None)
    assert sorted(NO_REPRODUCTION) == sorted(rule.name for rule in list_rules() if rule.no_reproduction is not None)


def test_every_rule_has_a_reason() -> None:
    assert all(rule.why for rule in list_rules())


def find_problems(setting: Setting, world_size: int) -> list[str]:
    """Return the problems that the check reports."""
    config = setting.make_config()
    setup = preflight.Setup(
        transformer=config.transformer,
        layout=setting.make_layout(world_size),
        options=setting.make_options(),
        model=config,
        environment=setting.environment,
        embedding_ranks=setting.embedding_ranks,
    )
    try:
        preflight.check(setup, (*rules.RULES, *make_builder(config).rules))
    except PreflightError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize("name", EVERY_CASE)
def test_each_case_is_refused_only_by_its_rule(name: str) -> None:
    found = find_problems(EVERY_CASE[name].refused, EVERY_CASE[name].world_size)
    assert [problem.rpartition(" ")[2] for problem in found] == [f"[{name}]"]


@pytest.mark.parametrize("name", EVERY_CASE)
def test_the_suggested_setting_passes(name: str) -> None:
    assert find_problems(EVERY_CASE[name].advised, EVERY_CASE[name].world_size) == []


def make_setup(setting: Setting, groups: ProcessGroupCollection | None = None) -> preflight.Setup:
    return preflight.Setup(
        transformer=setting.make_config().transformer,
        layout=setting.make_layout(4),
        options=setting.make_options(),
        groups=groups,
        environment=setting.environment,
    )


CONNECTIONS: dict[str, tuple[Setting, str | None]] = {
    "nothing is split": (Setting(environment=connections(8)), None),
    "Blackwell": (Setting(sizes=TENSOR_PARALLEL, environment=connections(8, (10, 0))), None),
    "no GPU": (Setting(sizes=TENSOR_PARALLEL), None),
    "FSDP goes before": (Setting(sizes=TENSOR_PARALLEL, flags=TORCH_FSDP2, environment=connections(8)), None),
    "context parallelism": (Setting(sizes=CONTEXT_PARALLEL, environment=connections(8)), "= 1, got 8"),
    "Megatron-FSDP on Blackwell": (
        Setting(**megatron_fsdp(), environment=connections(1, (10, 0))),
        "megatron-fsdp cannot overlap communication with CUDA_DEVICE_MAX_CONNECTIONS = 1",
    ),
}


@pytest.mark.parametrize("name", CONNECTIONS)
def test_cuda_device_max_connections_is_checked(name: str) -> None:
    setting, problem = CONNECTIONS[name]
    found = [one for rule in rules.RULES for one in rule.problems(make_setup(setting))]
    assert len(found) == (problem is not None)
    assert all(problem in one for one in found if problem)


def test_an_unset_cuda_device_max_connections_gives_a_warning() -> None:
    warning = machine.describe_slowdown(make_setup(Setting(sizes=TENSOR_PARALLEL, environment=on_gpu())))
    assert warning is not None
    assert warning.startswith("CUDA_DEVICE_MAX_CONNECTIONS is not set")
    for environment in (connections(1), on_gpu((10, 0)), Environment()):
        assert machine.describe_slowdown(make_setup(Setting(sizes=TENSOR_PARALLEL, environment=environment))) is None


def test_a_fused_loss_that_rounds_gradients_gives_a_warning() -> None:
    fused = {"cross_entropy_loss_fusion": True}
    assert layers.describe_rounding(make_setup(Setting(transformer=fused | {"bf16": True}))) is None
    warning = layers.describe_rounding(make_setup(Setting(transformer=fused)))
    assert warning is not None
    assert "this model computes in fp32: set cross_entropy_loss_fusion = False" in warning


def check_existing_groups() -> tuple[list[str], list[str]]:
    """Return the problems of two rules about groups that already exist: pipeline backend and two-level cp."""
    parallel_state.initialize_model_parallel(context_parallel_size=4, hierarchical_context_parallel_sizes=[2, 2])
    groups = ProcessGroupCollection.use_mpu_process_groups()
    backend = Setting(sizes=PIPELINE, transformer={"pipeline_model_parallel_comm_backend": "gloo"})
    levels = Setting(sizes={"cp": 4}, transformer={"cp_comm_type": "a2a+p2p"})
    return (
        list(process_groups.pipeline_backend.problems(make_setup(backend, groups))),
        list(process_groups.context_parallelism_in_two_levels.problems(make_setup(levels, groups))),
    )


def test_existing_process_groups_are_accepted() -> None:
    assert run_ranks(check_existing_groups, 4) == [([], [])] * 4


class Run(NamedTuple):
    """Losses and gradient norms by step."""

    losses: list[float]
    grad_norms: list[float | None]


def train_without_checks(settings: list[Setting]) -> list[Run | str]:
    """Train each setting without the checks; return the results or errors."""
    build.RULES = ()
    data_parallel.check_stages = lambda *_: None  # a second check for tied embeddings, of all builders
    outcomes: list[Run | str] = []
    for setting in settings:
        try:
            outcomes.append(train_setting(setting))
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
        destroy_process_groups()  # otherwise their threads would accumulate
    return outcomes


def train_setting(setting: Setting) -> Run:
    config, layout = setting.make_config(), setting.make_layout(torch.distributed.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        num_distributed_optimizer_instances=setting.ddp.get("num_distributed_optimizer_instances", 1),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)

    def draw(stages: list[MegatronModule]) -> list[MegatronModule]:
        draw_weights(stages, groups, vocab_size=VOCAB)
        return stages

    config.pre_wrap_hooks.append(draw)
    builder: Any = config.get_builder_cls()(config)
    type(builder).rules = ()
    stages = builder.build_distributed_models(groups, DistributedDataParallelConfig(**setting.ddp), **setting.flags)
    text = Text.read(TRAINING.text, vocab_size=VOCAB)
    steps = list(train(stages, groups, layout, text=text, options=TRAINING, forward_step=builder.forward_step))
    return Run([step.loss for step in steps], [step.grad_norm for step in steps])


@pytest.fixture(scope="module")
def one_process() -> dict[str, Run]:
    """Return the results on one process for the cases that train incorrectly."""
    names = [name for name, case in CASES.items() if case.error is None]
    outcomes = run_ranks(train_without_checks, 1, [_without_layout(CASES[name].refused) for name in names])[0]
    assert all(isinstance(outcome, Run) for outcome in outcomes), outcomes
    return dict(zip(names, (outcome for outcome in outcomes if isinstance(outcome, Run)), strict=True))


def _without_layout(setting: Setting) -> Setting:
    """Return the same model for one process."""
    of_model = ("num_layers", *EXPERTS, *PREDICTING)
    transformer = {name: value for name, value in setting.transformer.items() if name in of_model}
    return Setting(family=setting.family, transformer=transformer, model=setting.model)


@pytest.fixture(scope="module")
def shared_outcomes() -> dict[str, list[Run | str]]:
    """Return the results of the cases by rank; cases that fail in the same way on every rank share processes."""
    found: dict[str, list[Run | str]] = {}
    for world_size in (2, 4):
        names = [name for name, case in CASES.items() if case.world_size == world_size and not case.needs_own_processes]
        by_rank = run_ranks(train_without_checks, world_size, [CASES[name].refused for name in names], timeout=240)
        found |= {name: [rank[index] for rank in by_rank] for index, name in enumerate(names)}
    return found


@pytest.mark.parametrize("name", CASES)
def test_without_the_rule_training_fails_or_is_wrong(
    name: str, shared_outcomes: dict[str, list[Run | str]], one_process: dict[str, Run]
) -> None:
    case = CASES[name]
    outcomes = shared_outcomes[name] if name in shared_outcomes else _outcomes_alone(case)
    if case.error is not None:
        assert any(isinstance(outcome, str) and case.error in outcome for outcome in outcomes), outcomes
        return
    expected = one_process[name]
    for outcome in outcomes:
        assert isinstance(outcome, Run), outcome
        same_losses = outcome.losses == pytest.approx(expected.losses, rel=1e-5)
        same_norms = outcome.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
        assert (same_losses and same_norms) == case.is_ignored


def _outcomes_alone(case: Case) -> list[Run | str]:
    try:
        return [rank[0] for rank in run_ranks(train_without_checks, case.world_size, [case.refused], timeout=30)]
    except RankError as error:
        return [f"RankError: {error}"]


@preflight.rule()
def no_small_vocabulary(setup: preflight.Setup) -> Iterator[str]:
    """A rule of one family of models."""
    if getattr(setup.model, "vocab_size", VOCAB) < VOCAB:
        yield f"vocab_size is less than {VOCAB}: set it to {VOCAB}"


class BuilderWithRule(GPTModelBuilder):
    rules = (no_small_vocabulary,)


def build_with_own_rule(vocab_size: int) -> list[str]:
    """Build with a rule of the model family; return the problems."""
    config = Setting().make_config()
    assert isinstance(config, GPTModelConfig)
    config.vocab_size = vocab_size
    groups = create_process_groups(Layout())
    model_parallel_cuda_manual_seed(1)
    try:
        BuilderWithRule(config).build_distributed_models(groups, wrap_with_ddp=False)
    except PreflightError as error:
        return list(error.problems)
    finally:
        destroy_process_groups()
    return []


def test_a_model_family_can_add_its_own_rules() -> None:
    assert run_ranks(build_with_own_rule, 1, VOCAB - 1) == [
        ["vocab_size is less than 256: set it to 256 [no-small-vocabulary]"]
    ]
    assert run_ranks(build_with_own_rule, 1, VOCAB) == [[]]
