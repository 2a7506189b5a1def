"""What a checkpoint holds of the stages of a rank, in the form of megatron.training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, FullyShardedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

from bridge.dist.checkpoint.shards import Shard, is_sharded, list_shards, make_sharded_state_dict
from bridge.dist.engine.stages import unwrap
from bridge.dist.errors import CheckpointError

OPTIMIZER = "optimizer"
OPTIMIZER_PREFIXES = (f"{OPTIMIZER}.", "chained_")
"""How the names of an optimizer's tensors begin; all others are those of the model."""

SHARDING_TYPE = "distrib_optim_sharding_type"
RESHARDABLE = "fully_reshardable"
"""The form of a distributed optimizer in which each tensor has the shape and the name of its parameter."""

_SHARDS = "shards"
_OTHERS = "others"


@dataclass(frozen=True)
class ModelState:
    """The stages of a rank in a checkpoint."""

    state: dict[str, Any]
    """Sharded state dicts by megatron.training's keys: model, or model0, model1, ..."""

    take: Callable[[dict[str, Any], Collection[torch.Tensor]], None]
    """Gives the stages what was loaded, but no parameters whose main parameters were loaded to the same place."""

    shards: list[Shard] = field(default_factory=list)
    """The parameters of all stages, if FSDP divided them."""


def make_model_state(stages: Sequence[MegatronModule], metadata: dict[str, Any]) -> ModelState:
    """Return the state of the stages. Collective."""
    keys = ["model"] if len(stages) == 1 else [f"model{index}" for index in range(len(stages))]
    by_key = dict(zip(keys, stages, strict=True))
    if is_sharded(stages):
        return _make_sharded_state(by_key, metadata)

    def take(loaded: dict[str, Any], _: Collection[torch.Tensor]) -> None:
        for key, stage in by_key.items():
            stage.load_state_dict(loaded[key])

    return ModelState({key: make_sharded_state_dict(stage, metadata) for key, stage in by_key.items()}, take)


def _make_sharded_state(stages: dict[str, MegatronModule], metadata: dict[str, Any]) -> ModelState:
    found = {key: list_shards(stage, metadata) for key, stage in stages.items()}
    # Megatron-FSDP has parameters in fp32 only; checkpoints have them in the model's precision.
    rows = {
        key: [(shard, shard.parameter.to_local().detach().to(shard.dtype)) for shard in shards]
        for key, (shards, _) in found.items()
    }
    parts = {key: [part for shard, values in held for part in shard.cut(values)] for key, held in rows.items()}
    memory = {key: list_memory(one) for key, one in parts.items()}

    def take(loaded: dict[str, Any], main_parameters: Collection[torch.Tensor]) -> None:
        for key, stage in stages.items():
            fill(memory[key], loaded[key][_SHARDS])
            for shard, values in rows[key]:
                if shard.main is not shard.parameter or shard.parameter not in main_parameters:
                    shard.parameter.to_local().detach().copy_(values)
            unwrap(stage).load_state_dict(loaded[key][_OTHERS], strict=False)

    state = {key: {_SHARDS: parts[key], _OTHERS: others} for key, (_, others) in found.items()}
    return ModelState(state, take, [shard for shards, _ in found.values() for shard in shards])


def fill(memory: Sequence[torch.Tensor | None], loaded: Sequence[torch.Tensor]) -> None:
    """Copy what was loaded to where it belongs, which is where megatron-core 0.19.2 loads most of it."""
    for target, values in zip(memory, loaded, strict=True):
        assert target is not None
        target.copy_(values)


def update_computed_parameters(stage: MegatronModule) -> None:
    """Give the parameters that Megatron-FSDP computes with the values of those that its optimizer updates."""
    if isinstance(stage, FullyShardedDataParallel):
        wrapped: Any = stage.module
        wrapped.install_optimized_model_weights()


@torch.no_grad()
def gather_updated_parameters(stages: Sequence[MegatronModule], optimizer: Any = None) -> None:
    """Gather the parameters that the last step of a distributed optimizer updated, each on one rank.

    With ``overlap_param_gather`` the next forward pass would do so. Collective over the data-parallel ranks. Source:
    ``force_param_sync`` of megatron.training 0.19.2.

    Args:
        stages: The stages of this rank, wrapped or not.
        optimizer: Megatron's optimizer of the stages.

    Raises:
        CheckpointError: Only the optimizer has the updated parameters, and it is None.
    """
    wrapped = [stage for stage in stages if isinstance(stage, DistributedDataParallel)]
    waiting = [stage for stage in wrapped if stage.ddp_config.overlap_param_gather]
    if optimizer is not None:
        optimizer.prepare_model_params_for_param_sync()
    elif any(stage.ddp_config.reuse_grad_buf_for_mxfp8_param_ag for stage in waiting):
        raise CheckpointError(
            "with reuse_grad_buf_for_mxfp8_param_ag and overlap_param_gather only the optimizer has the updated "
            "parameters: save a checkpoint, and write its weights with `bridge export-hf`"
        )
    for stage in waiting:
        stage.start_param_sync(force_sync=True)


def make_content_metadata(*, distributed_optimizer: bool) -> dict[str, Any]:
    """Return how the state is written: every optimizer so that it can be loaded under any layout."""
    sharding = {SHARDING_TYPE: RESHARDABLE, "distrib_optim_fully_reshardable_mem_efficient": False}
    return {
        **(sharding if distributed_optimizer else {}),
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def uses_distributed_optimizer(stages: Sequence[MegatronModule]) -> bool:
    """Return whether the optimizer of these stages is Megatron's distributed one."""
    config = getattr(stages[0], "ddp_config", None)
    return config is not None and bool(config.use_distributed_optimizer)


def check_wrapper(stages: Sequence[MegatronModule]) -> None:
    """Check that the parameters of stages are whole, or divided into rows.

    Raises:
        CheckpointError: Megatron-FSDP shards them in another way.
    """
    for stage in stages:
        if not isinstance(stage, FullyShardedDataParallel):
            continue
        config = stage.ddp_config
        if (strategy := config.data_parallel_sharding_strategy) != "optim_grads_params":
            raise CheckpointError(
                f"Megatron-FSDP with data_parallel_sharding_strategy = {strategy!r} cannot be saved or loaded: set it "
                "to 'optim_grads_params'"
            )
        if config.num_distributed_optimizer_instances > 1:
            raise CheckpointError(
                "Megatron-FSDP with num_distributed_optimizer_instances > 1 cannot be saved or loaded: set it to 1"
            )


def add_groups(metadata: dict[str, Any], pg_collection: ProcessGroupCollection) -> dict[str, Any]:
    """Return metadata with the group that megatron-core derives replicas from."""
    return {**metadata, "dp_cp_group": pg_collection.dp_cp}


def list_memory(parts: Sequence[ShardedTensor]) -> list[torch.Tensor | None]:
    """Return the memory of parts that are loaded: megatron-core empties them."""
    return [part.data for part in parts]
