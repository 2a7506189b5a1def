"""The engine on real process groups: stages, order of the build, wrappers, and errors."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule, TransformerConfig
from ranks import run_ranks

from bridge.builders import HookError
from bridge.config import ModelConfig
from bridge.dist import (
    BuildOptions,
    DistributedModelBuilder,
    Layout,
    build_stages,
    create_process_groups,
    prepare_stages,
)
from bridge.dist.cpu import on_meta
from bridge.dist.engine.build import build_distributed
from bridge.dist.engine.wrap.ddp import compute_bucket_size
from bridge.dist.errors import BuilderContractError, LayoutError, OptionsError, PreflightError

WIDTH = 8


class Stage(MegatronModule):
    """A stage that stores its position in the pipeline."""

    def __init__(self, config: TransformerConfig, groups: ProcessGroupCollection, place: tuple[Any, ...]) -> None:
        super().__init__(config)
        self.place = place
        self.vp_stage = place[2]
        self.split = ColumnParallelLinear(
            WIDTH, WIDTH, config=config, init_method=torch.nn.init.normal_, tp_group=groups.tp
        )
        self.whole = torch.nn.Linear(WIDTH, WIDTH)
        self.frozen = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)


class Router(torch.nn.Module):
    """A module that keeps a bias in fp32 in the way of Megatron's router."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Buffer(torch.zeros(WIDTH))

    def _maintain_float32_expert_bias(self) -> None:
        self.bias.data = self.bias.data.float()


@dataclass(kw_only=True)
class StageConfig(ModelConfig):
    builder: ClassVar[str] = f"{__name__}.StageBuilder"
    transformer: TransformerConfig


@dataclass(kw_only=True)
class BareConfig(ModelConfig):
    builder: ClassVar[str] = f"{__name__}.BareBuilder"


class StageBuilder(DistributedModelBuilder[Stage, StageConfig]):
    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Stage:
        stage = Stage(self._model_config.transformer, pg_collection, (pre_process, post_process, vp_stage))
        stage.add_module("router", Router())
        return stage


class BareBuilder(DistributedModelBuilder[Stage, BareConfig]):
    def build_model(self, *args: Any, **kwargs: Any) -> Stage:
        raise NotImplementedError


def make_config(**transformer: Any) -> StageConfig:
    defaults: dict[str, Any] = {"num_layers": 6, "hidden_size": WIDTH, "num_attention_heads": 2}
    return StageConfig(transformer=TransformerConfig(**defaults | transformer))


def make_groups(config: StageConfig) -> ProcessGroupCollection:
    groups = create_process_groups(Layout.of(config.transformer, torch.distributed.get_world_size()))
    model_parallel_cuda_manual_seed(1)
    return groups


def unwrap_stage(stage: torch.nn.Module) -> Stage:
    while not isinstance(stage, Stage):
        stage = stage.module  # type: ignore[assignment]
    return stage


def module_names(stage: torch.nn.Module) -> list[str]:
    names = [type(stage).__name__]
    return names + module_names(stage.module) if isinstance(getattr(stage, "module", None), torch.nn.Module) else names  # type: ignore[arg-type]


# Stages


def stage_positions(**transformer: Any) -> list[tuple[Any, ...]]:
    config = make_config(**transformer)
    stages = StageBuilder(config).build_distributed_models(make_groups(config), wrap_with_ddp=False)
    assert all(stage.model_type is ModelType.encoder_or_decoder for stage in stages)
    return [stage.place for stage in stages]


def test_one_rank_builds_one_stage_and_refuses_virtual_ones() -> None:
    assert run_ranks(positions_without_pipeline, 1) == [[(True, True, None)]]


def positions_without_pipeline() -> list[tuple[Any, ...]]:
    config = make_config()
    groups = make_groups(config)
    with pytest.raises(LayoutError, match="vp = 3 needs a pipeline"):
        StageBuilder(make_config(virtual_pipeline_model_parallel_size=3)).build_distributed_models(
            groups, wrap_with_ddp=False
        )
    return [stage.place for stage in StageBuilder(config).build_distributed_models(groups, wrap_with_ddp=False)]


def test_two_ranks_build_their_virtual_stages() -> None:
    first, last = run_ranks(positions_in_virtual_pipeline, 2)
    assert first == [(True, False, 0), (False, False, 1), (False, False, 2)]
    assert last == [(False, False, 0), (False, False, 1), (False, True, 2)]


def positions_in_virtual_pipeline() -> list[tuple[Any, ...]]:
    return stage_positions(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=3,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=False,
        overlap_p2p_comm=True,
    )


# The order of the build, and arguments that it must not change


def build_twice() -> list[list[list[str]]]:
    config = make_config(bf16=True)
    recorded: list[list[list[str]]] = []

    def record(stages: list[MegatronModule]) -> list[MegatronModule]:
        recorded.append([module_names(stage) for stage in stages])
        return stages

    config.pre_wrap_hooks.append(record)
    config.post_wrap_hooks.append(record)
    ddp_config = DistributedDataParallelConfig(num_buckets=2, overlap_grad_reduce=True)
    before = dict(vars(ddp_config)), dict(vars(config.transformer)), [record], [record]
    builder = StageBuilder(config)
    groups = make_groups(config)
    builds = []
    for _ in range(2):
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        builds.append(builder.build_distributed_models(groups, ddp_config))
    after = vars(ddp_config), vars(config.transformer), config.pre_wrap_hooks, config.post_wrap_hooks
    assert after == before
    assert builds[0][0].ddp_config.bucket_size == builds[1][0].ddp_config.bucket_size  # type: ignore[union-attr]
    first, second = (dict(stages[0].named_parameters()) for stages in builds)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Split parameters are marked; all others have Megatron's defaults, which the optimizer reads.
    stage = unwrap_stage(builds[0][0])
    assert stage.split.weight.tensor_model_parallel is True
    assert stage.whole.weight.tensor_model_parallel is False
    # Mixed precision has cast everything except the router's bias.
    assert stage.whole.weight.dtype is torch.bfloat16
    assert stage.router.bias.dtype is torch.float32
    return recorded


def test_hooks_get_bare_then_wrapped_stages_and_builds_repeat() -> None:
    (recorded,) = run_ranks(build_twice, 1)
    bare, wrapped = [["Stage"]], [["DistributedDataParallel", "Float16Module", "Stage"]]
    assert recorded == [bare, wrapped, bare, wrapped]


def build_without_precision_wrapper() -> tuple[list[str], str]:
    config = make_config(bf16=True)
    builder = StageBuilder(config)
    stages = builder.build_distributed_models(make_groups(config), wrap_with_ddp=False, mixed_precision_wrapper=None)
    return module_names(stages[0]), str(stages[0].whole.weight.dtype)


def test_without_a_precision_wrapper_nothing_is_cast() -> None:
    assert run_ranks(build_without_precision_wrapper, 1) == [(["Stage"], "torch.float32")]


def build_with_hook(hook: Any) -> None:
    config = make_config()
    config.post_wrap_hooks.append(hook)
    StageBuilder(config).build_distributed_models(make_groups(config), wrap_with_ddp=False)


def return_none(stages: Any) -> None:
    pass


def return_tuple(stages: Any) -> Any:
    return tuple(stages)


def test_a_hook_that_returns_a_tuple_stops_the_build() -> None:
    with pytest.raises(HookError, match=r"hook 1 of 1, .*return_tuple, returned a tuple: return a list"):
        run_ranks(build_with_hook, 1, return_tuple)


def build_with_hooks_that_return_none() -> list[str]:
    """Build with last hooks that return None, in the configuration and as arguments; return the stages' classes."""
    config = make_config()
    config.pre_wrap_hooks.append(return_none)
    config.post_wrap_hooks.append(return_none)
    groups = make_groups(config)
    with pytest.warns(UserWarning, match=r"hook 1 of 1, .*return_none, returned None: its input list is kept"):
        stages = StageBuilder(config).build_distributed_models(groups, wrap_with_ddp=False)
    with pytest.warns(UserWarning, match="return_none, returned None"):
        stages += build_distributed(
            StageBuilder(config).build_model,
            config.transformer,
            groups,
            options=BuildOptions(wrap_with_ddp=False),
            pre_wrap_hook=return_none,  # type: ignore[arg-type]
            post_wrap_hook=return_none,  # type: ignore[arg-type]
        )
    return [name for stage in stages for name in module_names(stage)]


def test_the_last_hook_may_return_none() -> None:
    assert run_ranks(build_with_hooks_that_return_none, 1) == [["Stage", "Stage"]]


def devices_after_cpu_initialization() -> set[str]:
    config = make_config(use_cpu_initialization=True)
    groups = make_groups(config)
    stages = build_stages(StageBuilder(config).build_model, groups, vp_size=None)
    with on_meta():  # redirects `cuda` to another device than that of the stages
        (stage,) = prepare_stages(list(stages), config.transformer, groups, BuildOptions(wrap_with_ddp=False))
    return {tensor.device.type for tensor in (*stage.parameters(), *stage.buffers())}


def test_weights_initialised_on_the_cpu_are_moved_to_the_device() -> None:
    assert run_ranks(devices_after_cpu_initialization, 1) == [{"meta"}]


# Data-parallel wrappers


def wrapped_weights(random_init: bool, flags: dict[str, Any], ddp: dict[str, Any]) -> tuple[list[str], list[float]]:
    """Build from weights that differ by rank; return the wrappers and a whole weight's values after wrapping."""
    config = make_config()
    groups = make_groups(config)

    def fill_with_rank(stages: list[MegatronModule]) -> list[MegatronModule]:
        for parameter in stages[0].parameters():
            parameter.data.fill_(1.0 + torch.distributed.get_rank())
        return stages

    config.pre_wrap_hooks.append(fill_with_rank)
    (stage,) = StageBuilder(config).build_distributed_models(
        groups, DistributedDataParallelConfig(**ddp), data_parallel_random_init=random_init, **flags
    )
    weight = unwrap_stage(stage).whole.weight
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    return module_names(stage), sorted(set(local.detach().float().flatten().tolist()))


WRAPPERS = {
    "DistributedDataParallel": ({}, {}),
    "DistributedDataParallel, distributed optimizer": ({}, {"use_distributed_optimizer": True}),
    "TorchFullyShardedDataParallel": ({"use_torch_fsdp2": True}, {}),
    "FullyShardedDataParallel": (
        {"use_megatron_fsdp": True},
        {
            "use_megatron_fsdp": True,
            "use_distributed_optimizer": True,
            "data_parallel_sharding_strategy": "optim_grads_params",
            "gradient_reduce_div_fusion": False,
            "suggested_communication_unit_size": 1_000,  # Megatron derives it from its own layers; there are none here
        },
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_random_init_copies_the_weights_of_the_first_rank(name: str) -> None:
    for wrappers, values in run_ranks(wrapped_weights, 2, True, *WRAPPERS[name]):
        assert wrappers[0] == name.split(",")[0]
        assert values == [1.0]


def test_without_random_init_each_rank_keeps_its_weights() -> None:
    results = run_ranks(wrapped_weights, 2, False, {}, {})
    assert [values for _, values in results] == [[1.0], [2.0]]


def test_bucket_sizes_follow_megatron_training() -> None:
    """As in megatron.training: parameters // num_buckets, or max(40M, 1M per rank); None without overlap."""
    stages = [torch.nn.Linear(9, 10)]  # 100 parameters

    def size(**ddp: Any) -> int | None:
        return compute_bucket_size(DistributedDataParallelConfig(**ddp), stages, data_parallel_size=64)

    assert size(overlap_grad_reduce=True, num_buckets=4) == 25
    assert size(overlap_grad_reduce=True, bucket_size=7) == 7
    assert size(overlap_grad_reduce=True) == 64_000_000
    assert (
        compute_bucket_size(DistributedDataParallelConfig(overlap_grad_reduce=True), stages, data_parallel_size=2)
        == 4 * 10**7
    )
    assert size(num_buckets=4) is None
    assert size() is None


def bucket_counts(distributed_optimizer: bool, one_bucket: bool) -> list[int]:
    config = make_config(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=3,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=False,
        overlap_p2p_comm=True,
    )
    ddp_config = DistributedDataParallelConfig(
        overlap_grad_reduce=True, bucket_size=1, use_distributed_optimizer=distributed_optimizer
    )
    stages = StageBuilder(config).build_distributed_models(
        make_groups(config), ddp_config, overlap_param_gather_with_optimizer_step=one_bucket
    )
    return [sum(len(buffer.buckets) for buffer in stage.buffers) for stage in stages]  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_only_the_first_chunk_of_the_first_stage_is_split_into_buckets(distributed_optimizer: bool) -> None:
    first, second = run_ranks(bucket_counts, 2, distributed_optimizer, False)
    assert first == [4, 1, 1]  # weights and biases of two layers; the frozen layer has no gradients
    assert second == [1, 1, 1]
    assert run_ranks(bucket_counts, 2, distributed_optimizer, True)[0] == [1, 1, 1]


# Errors


def test_ddp_without_its_config_is_refused() -> None:
    with pytest.raises(OptionsError, match="ddp_config is None: pass a DistributedDataParallelConfig"):
        StageBuilder(make_config()).build_distributed_models(None)  # type: ignore[arg-type]


def test_a_configuration_without_a_transformer_is_refused() -> None:
    with pytest.raises(BuilderContractError, match="BareConfig has no TransformerConfig named 'transformer'"):
        BareBuilder(BareConfig()).build_distributed_models(None, wrap_with_ddp=False)  # type: ignore[arg-type]


def test_preflight_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(PreflightError(["one", "two"])))
    assert (error.problems, str(error)) == (("one", "two"), "one\ntwo")


def build_layers_in_a_pipeline(config: StageConfig, groups: ProcessGroupCollection, *, numbered: bool) -> str:
    """Build two stages of two layers each; return the error."""

    def add_layers(stages: list[MegatronModule]) -> list[MegatronModule]:
        layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(2)]
        for number, layer in enumerate(layers if numbered else [], 2 * groups.pp.rank() + 1):
            layer.layer_number = number  # type: ignore[assignment]
        stages[0].layers = torch.nn.ModuleList(layers)
        return stages

    config.pre_wrap_hooks = [add_layers]
    try:
        StageBuilder(config).build_distributed_models(groups, wrap_with_ddp=False)
    except BuilderContractError as error:
        return str(error)
    return ""


def build_layers_with_and_without_numbers() -> list[str]:
    config = make_config(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    groups = make_groups(config)
    return [build_layers_in_a_pipeline(config, groups, numbered=numbered) for numbered in (True, False)]


def test_layers_of_one_name_on_two_stages_are_refused_on_every_rank() -> None:
    for accepted, refused in run_ranks(build_layers_with_and_without_numbers, 2):
        assert accepted == ""
        assert "different layers of the same name: layers.0, layers.1; give each layer the attribute" in refused


def build_in_groups_of_another_size() -> None:
    groups = make_groups(make_config())
    StageBuilder(make_config(tensor_model_parallel_size=2)).build_distributed_models(groups, wrap_with_ddp=False)


def test_a_configuration_that_does_not_match_its_groups_is_refused() -> None:
    with pytest.raises(PreflightError, match="tensor_model_parallel_size is 2 but the tp process group has 1 rank"):
        run_ranks(build_in_groups_of_another_size, 1)
