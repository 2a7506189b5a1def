"""The options of the wrappers, on real ranks: each trains as one plain process does, or is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig, FullyShardedDataParallel, param_and_grad_buffer
from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import MegatronFSDP
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import unwrap_model
from ranks import run_ranks

from bridge.config import ModelConfig
from bridge.dist import (
    BuildOptions,
    DistributedModelBuilder,
    Layout,
    create_process_groups,
    destroy_process_groups,
    prepare_stages,
)
from bridge.dist.engine.stages import unwrapped
from bridge.dist.engine.weights import draw_weights
from bridge.dist.engine.wrap import data_parallel
from bridge.dist.errors import BuilderContractError, OptionsError, PreflightError
from bridge.dist.train.step import TrainOptions, train
from bridge.dist.train.text import Text, default_text

VOCAB = 256
STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}
BF16 = {"bf16": True}
EXPERTS = {"num_moe_experts": 2, "add_bias_linear": False, "moe_router_load_balancing_type": "none"}
SHARDED = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 2_000}


@dataclass(kw_only=True)
class GptConfig(ModelConfig):
    builder: ClassVar[str] = f"{__name__}.GptBuilder"
    transformer: TransformerConfig
    tied: bool = False


class GptBuilder(DistributedModelBuilder[GPTModel, GptConfig]):
    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        config = self._model_config.transformer
        return GPTModel(
            config,
            get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False),
            vocab_size=VOCAB,
            max_sequence_length=16,
            pre_process=bool(pre_process),
            post_process=bool(post_process),
            share_embeddings_and_output_weights=self._model_config.tied,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )


@dataclass(kw_only=True)
class Case:
    """One build of a tiny GPT. Parameters whose names begin with ``frozen`` are frozen before wrapping."""

    transformer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    frozen: str | None = None
    tied: bool = False
    drawn: bool = True
    seed_by_rank: bool = False

    @property
    def config(self) -> GptConfig:
        defaults: dict[str, Any] = {
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }
        return GptConfig(transformer=TransformerConfig(**defaults | self.transformer), tied=self.tied)


def fsdp(strategy: str = "optim_grads_params", *, ddp: dict[str, Any] | None = None, **case: Any) -> Case:
    options = SHARDED | {"data_parallel_sharding_strategy": strategy, "gradient_reduce_div_fusion": False}
    return Case(ddp=options | (ddp or {}), flags={"use_megatron_fsdp": True}, **case)


def fsdp2(**case: Any) -> Case:
    return Case(flags={"use_torch_fsdp2": True}, **case)


class Run(NamedTuple):
    """What a case gave on one rank."""

    losses: list[float]
    grad_norms: list[float | None]


class Built(NamedTuple):
    stages: list[Any]  # wrapped: what forwards to the model and has methods of its own
    groups: ProcessGroupCollection
    layout: Layout


@contextmanager
def built(case: Case, *, instances: int = 1) -> Iterator[Built]:
    """Build a case on process groups of its own, from weights drawn by name or by Megatron itself."""
    config = case.config
    layout = Layout.of(config.transformer, torch.distributed.get_world_size())
    groups = create_process_groups(layout, optimizer_instances=instances)
    model_parallel_cuda_manual_seed(1 + case.seed_by_rank * groups.dp.rank(), force_reset_rng=True)

    def prepare(stages: list[MegatronModule]) -> list[MegatronModule]:
        if case.drawn:
            draw_weights(stages, groups, vocab_size=VOCAB)
        for name, parameter in stages[0].named_parameters():
            if case.frozen is not None and name.startswith(case.frozen):
                parameter.requires_grad_(False)
        return stages

    config.pre_wrap_hooks.append(prepare)
    try:
        ddp_config = DistributedDataParallelConfig(**case.ddp)
        yield Built(GptBuilder(config).build_distributed_models(groups, ddp_config, **case.flags), groups, layout)
    finally:
        destroy_process_groups()


def trained(built: Built, *, steps: int = 3) -> Run:
    text = Text.read(default_text(), vocab_size=VOCAB)
    options = TrainOptions(steps=steps, text=default_text(), seq_length=16, global_batch_size=4)
    taken = list(train(list(built.stages), built.groups, built.layout, text=text, options=options))
    return Run([step.loss for step in taken], [step.grad_norm for step in taken])


def train_cases(cases: dict[str, Case], instances: int = 1) -> dict[str, Run]:
    """On each rank: train each case from the same weights."""
    runs = {}
    for name, case in cases.items():
        with built(case, instances=instances) as stages:
            runs[name] = trained(stages)
    return runs


def assert_equal(run: Run, expected: Run, *, rel: float = 1e-5) -> None:
    assert run.losses == pytest.approx(expected.losses, rel=rel)
    assert run.grad_norms == pytest.approx(expected.grad_norms, rel=10 * rel)


@pytest.fixture(scope="module")
def alone() -> dict[str, Run]:
    """What one process gives."""
    cases = {
        "fp32": Case(),
        "bf16": Case(transformer=BF16, ddp={"grad_reduce_in_fp32": True}),
        "frozen embedding": Case(frozen="embedding"),
        "frozen part of a layer": Case(frozen="decoder.layers.0.self_attention"),
        "frozen layer": Case(frozen="decoder.layers.0"),
        "frozen": Case(frozen=""),
    }
    return run_ranks(train_cases, 1, cases)[0]


# DDP

DDP = {
    "overlap": Case(ddp=OVERLAP),
    "buckets by number": Case(ddp={"overlap_grad_reduce": True, "num_buckets": 3}),
    "average": Case(ddp={"average_in_collective": True}),
    "checks of gradients": Case(ddp={"check_for_nan_in_grad": True, "check_for_large_grads": True}),
    "delayed weight gradients": Case(ddp={"delay_wgrad_compute": True}),
    "distributed optimizer": Case(ddp=SHARDED),
    "distributed optimizer, average": Case(ddp=SHARDED | {"average_in_collective": True}),
    "distributed optimizer, overlap, padded buckets": Case(
        ddp=SHARDED | OVERLAP | {"pad_buckets_for_high_nccl_busbw": True}
    ),
    "fp32 accumulation": Case(ddp=SHARDED | OVERLAP | {"reduce_scatter_with_fp32_accumulation": True}),
    # After the one before: what that leaves in megatron-core must not reach this one.
    "all overlap": Case(ddp=SHARDED | OVERLAP | {"overlap_param_gather": True}),
    "all overlap, aligned": Case(ddp=SHARDED | OVERLAP | {"overlap_param_gather": True, "align_param_gather": True}),
    "all overlap, one bucket": Case(
        ddp=SHARDED | OVERLAP | {"overlap_param_gather": True}, flags={"overlap_param_gather_with_optimizer_step": True}
    ),
}


def test_options_of_ddp_do_not_change_what_is_trained(alone: dict[str, Run]) -> None:
    for runs in run_ranks(train_cases, 2, DDP):
        for run in runs.values():
            assert_equal(run, alone["fp32"])


def leave_fp32_accumulation() -> bool:
    with built(DDP["fp32 accumulation"]):
        return bool(param_and_grad_buffer.dist_reduce_scatter_func is torch.distributed.reduce_scatter_tensor)


def test_megatron_still_leaves_fp32_accumulation_behind() -> None:
    """When this fails megatron-core has mended it: let wrap.py no longer put the function back."""
    assert run_ranks(leave_fp32_accumulation, 1) == [False]


def test_precisions_of_gradients(alone: dict[str, Run]) -> None:
    cases = {
        "fp32": Case(transformer=BF16, ddp={"grad_reduce_in_fp32": True}),
        "fp32 accumulation": Case(transformer=BF16, ddp={"param_name_patterns_for_fp32_local_accumulation": ("all",)}),
        "fp16": Case(transformer={"fp16": True}, ddp={"grad_reduce_in_fp32": True}),
        "fsdp2, fp16": fsdp2(transformer={"fp16": True}),
    }
    for runs in run_ranks(train_cases, 2, cases):
        for run in runs.values():
            assert_equal(run, alone["bf16"], rel=2**-10)


def test_several_optimizer_instances(alone: dict[str, Run]) -> None:
    instances = {"num_distributed_optimizer_instances": 2}
    cases = {
        "ddp": Case(ddp=SHARDED | instances),
        "ddp, overlap, average": Case(
            ddp=SHARDED | OVERLAP | instances | {"overlap_param_gather": True, "average_in_collective": True}
        ),
        "megatron-fsdp, gradients sharded": fsdp("optim_grads", ddp=instances),
        "megatron-fsdp": fsdp(ddp=instances),
    }
    for runs in run_ranks(train_cases, 4, cases, 2):
        for run in runs.values():
            assert_equal(run, alone["fp32"])


def test_optimizer_instances_that_the_groups_do_not_have() -> None:
    with pytest.raises(PreflightError, match="num_distributed_optimizer_instances is 2, the process groups were made"):
        run_ranks(train_cases, 2, {"": Case(ddp=SHARDED | {"num_distributed_optimizer_instances": 2})})


def layer_wise_gradients() -> None:
    """On each rank: the layout keeps matrices whole on one rank, whose gradients are those of plain DDP."""
    expected = gradients(Case())
    flags = {"use_layer_wise_distributed_optimizer": True}
    whole = gradients(Case(ddp=OVERLAP, flags=flags | {"use_layer_wise_param_layout": False}))
    assert all(torch.allclose(whole[name], gradient, atol=1e-6) for name, gradient in expected.items())
    with built(Case(ddp=OVERLAP, flags=flags)) as made:
        backward(made)
        (stage,) = made.stages
        matrices = {
            name: parameter
            for name, parameter in stage.module.named_parameters()
            if parameter.dim() == 2 and "embedding" not in name and "output_layer" not in name
        }
        mine = set()
        for buffer in stage.buffers:
            for bucket in buffer.buckets:
                size = bucket.grad_data.numel() // made.groups.dp_cp.size()
                for name, parameter in matrices.items():
                    if parameter in bucket.params:
                        start, end, _ = buffer.param_index_map[parameter]
                        shards = (start - bucket.offset) // size, (end - 1 - bucket.offset) // size
                        assert shards[0] == shards[1], name
                        if shards[0] == made.groups.dp_cp.rank():
                            mine.add(name)
        assert mine
        for name in mine:
            assert torch.allclose(matrices[name].main_grad, expected[name], atol=1e-6), name
        everyone: list[Any] = [None, None]
        torch.distributed.all_gather_object(everyone, mine)
        assert sorted(everyone[0] | everyone[1]) == sorted(matrices)
        assert not everyone[0] & everyone[1]


def gradients(case: Case) -> dict[str, torch.Tensor]:
    with built(case) as made:
        backward(made)
        return {name: parameter.main_grad.clone() for name, parameter in made.stages[0].module.named_parameters()}


def backward(made: Built) -> None:
    (stage,) = made.stages
    tokens = torch.arange(16)[None] * 7 % VOCAB + made.groups.dp.rank()
    stage(tokens, torch.arange(16)[None], None, labels=tokens.flip(1)).mean().backward()
    stage.finish_grad_sync()


def test_layer_wise_layout() -> None:
    run_ranks(layer_wise_gradients, 2)


# The FSDP wrappers


def test_options_of_megatron_fsdp_do_not_change_what_is_trained(alone: dict[str, Run]) -> None:
    cases = {
        **{strategy: fsdp(strategy) for strategy in STRATEGIES},
        **{f"{strategy}, tp2": fsdp(strategy, transformer=TP2) for strategy in STRATEGIES},
        "overlap": fsdp(ddp=OVERLAP | {"overlap_param_gather": True}),
        "fsdp2, tp2": fsdp2(transformer=TP2),
        "fsdp2, overlap": fsdp2(ddp=OVERLAP),
    }
    for runs in run_ranks(train_cases, 2, cases):
        for run in runs.values():
            assert_equal(run, alone["fp32"])


class Plain(MegatronModule):
    """A stage of none of Megatron's layers."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.linear = torch.nn.Linear(8, 8)


def wrap_plain_model() -> int:
    config = Case().config.transformer
    groups = create_process_groups(Layout())
    ddp_config = DistributedDataParallelConfig(**fsdp().ddp)
    options = BuildOptions(ddp_config=ddp_config, use_megatron_fsdp=True)
    (stage,) = prepare_stages([Plain(config)], config, groups, options)
    assert ddp_config.suggested_communication_unit_size is None
    with pytest.raises(ZeroDivisionError):  # when it is no longer raised, wrap.py need not give a size
        FullyShardedDataParallel(config=config, ddp_config=ddp_config, module=Plain(config), pg_collection=groups)
    return int(stage.ddp_config.suggested_communication_unit_size)


def test_megatron_still_unwraps_one_of_the_two_wrappers_of_megatron_fsdp() -> None:
    """When this fails, `bridge.dist.engine.stages.unwrapped` is no longer needed."""
    adapter, wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel), MegatronFSDP.__new__(MegatronFSDP)
    for module in (adapter, wrapper):
        torch.nn.Module.__init__(module)
    adapter.module, wrapper.module = wrapper, torch.nn.Identity()
    assert unwrap_model(adapter) is wrapper
    assert unwrapped(adapter) is wrapper.module


def test_megatron_fsdp_of_a_model_without_megatron_layers() -> None:
    assert run_ranks(wrap_plain_model, 1) == [1_000_000_000]


# Frozen parameters


@pytest.mark.parametrize("frozen", ["embedding", "decoder.layers.0.self_attention", "decoder.layers.0", ""])
def test_frozen_parameters(frozen: str, alone: dict[str, Run]) -> None:
    names = {
        "embedding": "frozen embedding",
        "decoder.layers.0": "frozen layer",
        "decoder.layers.0.self_attention": "frozen part of a layer",
        "": "frozen",
    }
    expected = alone[names[frozen]]
    assert expected.losses[1:] != pytest.approx(alone["fp32"].losses[1:], rel=1e-5)
    cases = {
        "ddp": Case(frozen=frozen),
        "distributed optimizer": Case(ddp=SHARDED, frozen=frozen),
        "fsdp2": fsdp2(frozen=frozen),
        **{strategy: fsdp(strategy, frozen=frozen) for strategy in STRATEGIES if strategy != "optim"},
    }
    for runs in run_ranks(train_cases, 2, cases):
        for run in runs.values():
            assert_equal(run, expected)


def test_frozen_parameters_with_a_sharded_optimizer_alone() -> None:
    with pytest.raises(PreflightError, match=r"fails with frozen parameters when data_parallel_sharding_strategy is"):
        run_ranks(train_cases, 2, {"": fsdp("optim", frozen="embedding")})


def train_frozen_unchecked() -> None:
    wrap._check_stages = lambda *_: None
    train_cases({"": fsdp("optim", frozen="embedding")})


def test_megatron_still_fails_with_frozen_parameters_and_a_sharded_optimizer_alone() -> None:
    """When this fails megatron-core has mended it: lift the refusal."""
    with pytest.raises(AttributeError, match="is_data_distributed"):
        run_ranks(train_frozen_unchecked, 2)


def test_fsdp2_of_tied_embeddings() -> None:
    with pytest.raises(PreflightError, match="torch FSDP2 fails with tied embeddings: untie them"):
        run_ranks(train_cases, 1, {"": fsdp2(tied=True)})


# Random initialisation, and the meta device


def test_ranks_that_draw_other_weights_end_with_those_of_the_first() -> None:
    drawn = {
        "ddp": Case(drawn=False),
        "fsdp2": fsdp2(drawn=False),
        **{strategy: fsdp(strategy, drawn=False) for strategy in STRATEGIES},
    }
    cases = {"expected": drawn["ddp"]} | {name: replace(case, seed_by_rank=True) for name, case in drawn.items()}
    cases |= {
        f"{name}, meta": replace(cases[name], transformer={"init_model_with_meta_device": True}) for name in drawn
    }
    for runs in run_ranks(train_cases, 2, cases):
        for run in runs.values():
            assert_equal(run, runs["expected"])


def weights_of_experts() -> dict[str, float]:
    with built(Case(transformer=EXPERTS | {"expert_model_parallel_size": 2}, drawn=False, seed_by_rank=True)) as made:
        return {name: parameter.sum().item() for name, parameter in made.stages[0].named_parameters()}


def test_experts_are_equal_within_their_own_group_only() -> None:
    ranks = run_ranks(weights_of_experts, 4)
    experts = {name for name in ranks[0] if "local_experts" in name and "weight" in name}
    assert experts
    assert ranks[0] == ranks[2]
    assert ranks[1] == ranks[3]
    assert {name for name in ranks[0] if ranks[0][name] != ranks[1][name]} == experts


def attributes(made: Built) -> dict[str, list[str]]:
    return {name: sorted(vars(parameter)) for name, parameter in made.stages[0].named_parameters()}


def train_on_meta(cases: dict[str, Case]) -> list[str]:
    """On each rank: from the meta device and without it, the same is trained; return what was warned of."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("bridge.dist.engine.meta").addHandler(handler)
    for name, case in cases.items():
        with built(case) as made:
            expected_attributes, expected = attributes(made), trained(made, steps=1)
        with built(replace(case, transformer=case.transformer | {"init_model_with_meta_device": True})) as made:
            assert not any(tensor.is_meta for tensor in made.stages[0].state_dict().values() if tensor is not None)
            assert attributes(made) == expected_attributes, name
            assert trained(made, steps=1) == expected, name
    return records


def test_stages_from_the_meta_device_have_the_weights_of_others() -> None:
    cases = {
        "ddp, bf16": Case(transformer=BF16, drawn=False),
        "ddp, tp2": Case(transformer=TP2, drawn=False),
        "ddp, experts, bf16": Case(transformer=EXPERTS | BF16, drawn=False),
        "ddp, pp2, tied": Case(transformer=PP2, tied=True, drawn=False),
        "megatron-fsdp, whole weights": fsdp("optim_grads", drawn=False),
        "megatron-fsdp, bf16": fsdp(transformer=BF16, drawn=False),
        "megatron-fsdp, tp2": fsdp(transformer=TP2, drawn=False),
        "megatron-fsdp, experts": fsdp(transformer=EXPERTS, drawn=False),
        "fsdp2, bf16": fsdp2(transformer=BF16, drawn=False),
    }
    assert run_ranks(train_on_meta, 2, cases, timeout=240) == [[], []]


class Unknown(torch.nn.Module):
    """Cannot initialise itself again."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.count = torch.nn.Buffer(torch.ones((), dtype=torch.long))


class MetaStage(MegatronModule):
    """Has, on the meta device, a module of each kind: known, unknown, and half loaded."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        with torch.device("meta"):
            self.known, self.unknown, self.partly = torch.nn.LayerNorm(3), Unknown(), torch.nn.Linear(3, 3)
        self.partly.bias = torch.nn.Parameter(torch.full((3,), 5.0))


def build_what_cannot_initialise_itself(flags: dict[str, Any], ddp: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("bridge.dist.engine.meta").addHandler(handler)
    config = Case(transformer={"init_model_with_meta_device": True}).config.transformer
    groups = create_process_groups(Layout())
    options = BuildOptions(ddp_config=DistributedDataParallelConfig(**ddp), **flags)
    (stage,) = prepare_stages([MetaStage(config)], config, groups, options)
    values = {}
    for name, tensor in stage.state_dict().items():
        local = tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
        values[name.removeprefix("module.")] = local.flatten().tolist()
    return values, records


@pytest.mark.parametrize("case", [Case(), fsdp("optim_grads"), fsdp(), fsdp2(), Case(flags={"wrap_with_ddp": False})])
def test_what_cannot_initialise_itself_is_nan_and_named(case: Case) -> None:
    ((values, records),) = run_ranks(build_what_cannot_initialise_itself, 1, case.flags, case.ddp)
    assert values["known.weight"] == [1.0] * 3
    assert values["unknown.scale"] == pytest.approx([float("nan")] * 3, nan_ok=True)
    assert values["partly.bias"] == [5.0] * 3
    assert all(abs(value) < 1 for value in values["partly.weight"])
    (record,) = records
    assert "nothing initialises unknown.scale, unknown.count, they are NaN; load a checkpoint before use" in record


# Mixed precision


class Half(MegatronModule):
    """A wrapper of an extension's own, which keeps norms in fp32."""

    def __init__(self, config: TransformerConfig, module: MegatronModule) -> None:
        super().__init__(config)
        self.module = module.bfloat16()
        for name, parameter in module.named_parameters():
            if "layernorm" in name:
                parameter.data = parameter.data.float()


def cast_in_place(_: TransformerConfig, module: MegatronModule) -> MegatronModule:
    return module.bfloat16()


def returns_nothing(_: TransformerConfig, __: MegatronModule) -> None:
    pass


def wrap_precision(wrapper: Any) -> tuple[str, dict[str, str], list[float]]:
    """Build experts with a router bias that bf16 cannot hold, and return the dtypes and that bias."""
    case = Case(
        transformer=BF16
        | EXPERTS
        | {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid", "moe_router_topk": 1}
    )
    config = case.config

    def set_bias(stages: list[MegatronModule]) -> list[MegatronModule]:
        for name, buffer in stages[0].named_buffers():
            if name.endswith("expert_bias"):
                buffer.fill_(1 / 3)
        return stages

    config.pre_wrap_hooks.append(set_bias)
    groups = create_process_groups(Layout())
    model_parallel_cuda_manual_seed(1)
    (stage,) = GptBuilder(config).build_distributed_models(
        groups, DistributedDataParallelConfig(), mixed_precision_wrapper=wrapper
    )
    dtypes = {name.replace("module.", ""): str(tensor.dtype) for name, tensor in stage.named_parameters()}
    bias = [buffer.double() for name, buffer in stage.named_buffers() if name.endswith("expert_bias")]
    return type(stage.module).__name__, dtypes, torch.cat(bias).tolist()


@pytest.mark.parametrize("wrapper", [Float16Module, Half, cast_in_place])
def test_mixed_precision_wrappers(wrapper: Any) -> None:
    ((name, dtypes, bias),) = run_ranks(wrap_precision, 1, wrapper)
    assert name == ("GPTModel" if wrapper is cast_in_place else wrapper.__name__)
    assert bias == pytest.approx([1 / 3] * 4, rel=1e-7)  # fp32: bf16 would be off by 1e-3
    kept = {parameter for parameter, dtype in dtypes.items() if dtype == "torch.float32"}
    norms = {parameter for parameter in dtypes if "layernorm" in parameter}
    assert norms
    assert kept == (norms if wrapper is Half else set())


def test_a_mixed_precision_wrapper_that_returns_nothing() -> None:
    with pytest.raises(BuilderContractError, match="mixed_precision_wrapper returns_nothing returned NoneType: return"):
        run_ranks(wrap_precision, 1, returns_nothing)


# Contradictions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ddp_config": {"use_megatron_fsdp": True}}, "ddp_config.use_megatron_fsdp is True but use_megatron_fsdp is"),
        ({"ddp_config": {}, "use_torch_fsdp2": True, "use_layer_wise_distributed_optimizer": True}, "is torch-fsdp2"),
        (
            {
                "ddp_config": SHARDED,
                "use_layer_wise_distributed_optimizer": True,
                "use_layer_wise_param_layout": False,
            },
            "needs the whole gradients on each rank",
        ),
    ],
)
def test_contradictory_options(options: dict[str, Any], message: str) -> None:
    ddp_config = DistributedDataParallelConfig(**options.pop("ddp_config"))
    with pytest.raises(OptionsError, match=message):
        BuildOptions(ddp_config=ddp_config, **options)
