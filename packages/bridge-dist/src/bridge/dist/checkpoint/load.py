"""Load a Megatron checkpoint into the stages of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

from bridge.dist.checkpoint.folder import find_iteration
from bridge.dist.checkpoint.match import match_state
from bridge.dist.checkpoint.optimizer import make_loading_state, set_optimizer_state
from bridge.dist.checkpoint.progress import Progress
from bridge.dist.checkpoint.random_states import KEY, collect_random_states, restore_random_states
from bridge.dist.checkpoint.reader import Checkpoint
from bridge.dist.checkpoint.state import (
    OPTIMIZER,
    OPTIMIZER_PREFIXES,
    SHARDING_TYPE,
    add_groups,
    check_wrapper,
    list_stage_keys,
    make_model_state,
    uses_distributed_optimizer,
)
from bridge.dist.checkpoint.together import raise_together
from bridge.dist.errors import CheckpointError

_RESHARDABLE = ("fully_reshardable", "fully_sharded_model_space")


def load_checkpoint(
    stages: Sequence[MegatronModule],
    folder: str | Path,
    pg_collection: ProcessGroupCollection,
    *,
    optimizer: Any = None,
) -> Progress:
    """Load a checkpoint of the format torch_dist, saved under any layout, into the stages of all ranks.

    Collective over all ranks. Reading runs nothing that is in the folder. Random states are restored if the tensor- and
    pipeline-parallel sizes are those of the checkpoint; Megatron has none for others.

    Args:
        stages: The stages of this rank, wrapped or not, with memory.
        folder: The folder of all iterations, of which the latest is loaded, or the folder of one iteration.
        pg_collection: The process groups of this rank.
        optimizer: Megatron's optimizer of the stages. If the checkpoint has no optimizer, it starts anew from the
            loaded weights.

    Returns:
        How far the run was that saved it.

    Raises:
        CheckpointError: The checkpoint is damaged, or not one of these stages: all problems, before anything is loaded.
    """
    with raise_together():
        check_wrapper(stages)
        checkpoint = Checkpoint(find_iteration(Path(folder)))
        has_optimizer = optimizer is not None and _has_optimizer(checkpoint)
        if has_optimizer:
            _check_optimizer(checkpoint, stages, pg_collection)
    metadata = add_groups(checkpoint.common.get("content_metadata") or {}, pg_collection)
    state = make_model_state(stages, metadata)
    if has_optimizer:
        state[OPTIMIZER] = make_loading_state(optimizer, state, metadata=metadata)
    if _is_same_layout(checkpoint, pg_collection):
        state[KEY] = collect_random_states(pg_collection)
    with raise_together() as problems:
        problems += match_state(state, checkpoint)
    with raise_together():
        loaded = checkpoint.load(state)
    for key, stage in zip(list_stage_keys(stages), stages, strict=True):
        stage.load_state_dict(loaded[key])
    if has_optimizer:
        set_optimizer_state(optimizer, loaded[OPTIMIZER])
    elif optimizer is not None:
        optimizer.reload_model_params()
    if KEY in state:
        restore_random_states(loaded[KEY])
    samples = checkpoint.get_argument("consumed_train_samples", 0)
    return Progress(step=checkpoint.common.get("iteration", 0), samples=samples)


def _has_optimizer(checkpoint: Checkpoint) -> bool:
    return OPTIMIZER in checkpoint.common or any(
        name.startswith(OPTIMIZER_PREFIXES) for name in checkpoint.metadata.state_dict_metadata
    )


def _is_same_layout(checkpoint: Checkpoint, pg_collection: ProcessGroupCollection) -> bool:
    """Return whether the checkpoint has random states for these tensor- and pipeline-parallel ranks."""
    sizes = f"{pg_collection.pp.size()}.{pg_collection.tp.size()}"
    return f"{KEY}/shard_0.0_{sizes}" in checkpoint.metadata.state_dict_metadata


def _check_optimizer(
    checkpoint: Checkpoint, stages: Sequence[MegatronModule], pg_collection: ProcessGroupCollection
) -> None:
    """Check that the optimizer of the checkpoint is of the same kind and can be divided anew.

    Raises:
        CheckpointError: It is not.
    """
    saved, ours = checkpoint.get_argument("use_distributed_optimizer"), uses_distributed_optimizer(stages)
    if saved is not None and bool(saved) != ours:
        kinds = {True: "Megatron's distributed optimizer", False: "an optimizer that is not distributed"}
        advice = "pass" if saved else "leave out"
        raise CheckpointError(
            f"{checkpoint.iteration} was saved by {kinds[bool(saved)]}, but the stages have {kinds[ours]}: "
            f"{advice} --distributed-optimizer"
        )
    sharding = (checkpoint.common.get("content_metadata") or {}).get(SHARDING_TYPE)
    sizes = tuple(checkpoint.get_argument(f"{axis}_model_parallel_size", 1) for axis in ("tensor", "pipeline"))
    mine = pg_collection.tp.size(), pg_collection.pp.size()
    if sharding is not None and sharding not in _RESHARDABLE and sizes != mine:
        raise CheckpointError(
            f"the optimizer in {checkpoint.iteration} can only be loaded with tp, pp = {sizes[0]}, {sizes[1]}, got "
            f"{mine[0]}, {mine[1]}: use that layout, or save it with --dist-ckpt-optim-fully-reshardable"
        )
