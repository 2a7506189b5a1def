"""What a checkpoint holds of the stages of a rank, in the form of megatron.training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import FullyShardedDataParallel, TorchFullyShardedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

from bridge.dist.engine.stages import unwrap
from bridge.dist.errors import CheckpointError

OPTIMIZER = "optimizer"
OPTIMIZER_PREFIXES = (f"{OPTIMIZER}.", "chained_")
"""How the names of an optimizer's tensors begin; all others are those of the model."""

SHARDING_TYPE = "distrib_optim_sharding_type"
# megatron-core 0.19.2: Megatron-FSDP has a format of its own, and with torch 2.15 no parameter of FSDP2 is found in the
# optimizer, whose shards would have to be of equal size.
_UNSUPPORTED = {FullyShardedDataParallel: "Megatron-FSDP", TorchFullyShardedDataParallel: "torch FSDP2"}


def make_model_state(stages: Sequence[MegatronModule], metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the sharded state dicts of the stages by megatron.training's keys: model, or model0, model1, ..."""
    keys = list_stage_keys(stages)
    return {key: unwrap(stage).sharded_state_dict(metadata=metadata) for key, stage in zip(keys, stages, strict=True)}


def list_stage_keys(stages: Sequence[MegatronModule]) -> list[str]:
    """Return megatron.training's key of each stage."""
    return ["model"] if len(stages) == 1 else [f"model{index}" for index in range(len(stages))]


def make_content_metadata(*, distributed_optimizer: bool) -> dict[str, Any]:
    """Return how the state is written: every optimizer so that it can be loaded under any layout."""
    sharding = {SHARDING_TYPE: "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}
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
    """Check that megatron-core can save and load the stages in this format.

    Raises:
        CheckpointError: They are wrapped by FSDP.
    """
    for cls, name in _UNSUPPORTED.items():
        if any(isinstance(module, cls) for stage in stages for module in stage.modules()):
            raise CheckpointError(describe_unsupported(name))


def describe_unsupported(wrapper: str) -> str:
    """Return why stages of a wrapper are neither saved nor loaded, and what to do."""
    return (
        f"megatron-core cannot save or load {wrapper} in the format torch_dist: wrap with ddp and shard the optimizer "
        "(--wrap ddp --distributed-optimizer), or save weights as a Hugging Face folder"
    )


def add_groups(metadata: dict[str, Any], pg_collection: ProcessGroupCollection) -> dict[str, Any]:
    """Return metadata with the group that megatron-core derives replicas from."""
    return {**metadata, "dp_cp_group": pg_collection.dp_cp}
