"""Load a Megatron checkpoint into the stages of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

from bridge.dist.checkpoint.folder import find_iteration
from bridge.dist.checkpoint.match import match_state
from bridge.dist.checkpoint.optimizer import make_loading_state, restart
from bridge.dist.checkpoint.progress import Progress
from bridge.dist.checkpoint.random_states import KEY, check_random_states, collect_random_states, restore_random_states
from bridge.dist.checkpoint.reader import Checkpoint
from bridge.dist.checkpoint.shards import is_sharded
from bridge.dist.checkpoint.state import (
    OPTIMIZER,
    OPTIMIZER_PREFIXES,
    RESHARDABLE,
    SHARDING_TYPE,
    add_groups,
    check_wrapper,
    make_model_state,
    update_computed_parameters,
    uses_distributed_optimizer,
)
from bridge.dist.checkpoint.together import raise_together
from bridge.dist.errors import CheckpointError


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
    metadata = add_groups({SHARDING_TYPE: RESHARDABLE} | checkpoint.content, pg_collection)
    model = make_model_state(stages, metadata)
    state = dict(model.state)
    saved_optimizer = None
    with raise_together():
        if has_optimizer:
            saved_optimizer = make_loading_state(optimizer, model, checkpoint, metadata=metadata)
            state |= saved_optimizer.state
    if _is_same_layout(checkpoint, pg_collection):
        state[KEY] = collect_random_states(pg_collection)
    loaded = _read(checkpoint, state)
    model.take(loaded, () if saved_optimizer is None else saved_optimizer.main_parameters)
    if saved_optimizer is not None:
        saved_optimizer.take(loaded)
    elif optimizer is not None:
        restart(optimizer, model)
    for stage in stages:
        update_computed_parameters(stage)
    with raise_together():  # what has Megatron's form may have other types within
        if KEY in state:
            restore_random_states(loaded[KEY])
    return Progress(step=checkpoint.step, samples=checkpoint.samples)


def _read(checkpoint: Checkpoint, state: dict[str, Any]) -> dict[str, Any]:
    """Return what the checkpoint has for a sharded state dict. Collective.

    Raises:
        CheckpointError: It has not all of it, more, or something else.
    """
    with raise_together() as problems:
        problems += match_state(state, checkpoint)
    with raise_together():
        loaded = checkpoint.load(state)
        if KEY in state:
            check_random_states(loaded[KEY], at=checkpoint.iteration)
    return loaded


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
    """Check that the optimizer of the checkpoint can be divided anew, or is divided as that of the stages.

    Raises:
        CheckpointError: It is not.
    """
    sharding = checkpoint.content.get(SHARDING_TYPE, RESHARDABLE)
    if sharding == RESHARDABLE:
        return
    sizes = tuple(checkpoint.get_argument(f"{axis}_model_parallel_size", 1) for axis in ("tensor", "pipeline"))
    mine = pg_collection.tp.size(), pg_collection.pp.size()
    if is_sharded(stages) or not uses_distributed_optimizer(stages) or sizes != mine:
        raise CheckpointError(
            f"the optimizer in {checkpoint.iteration} is written as {sharding!r}: it can only be loaded with DDP, "
            f"--distributed-optimizer and tp, pp = {sizes[0]}, {sizes[1]}: use these, or save it with "
            "--dist-ckpt-optim-fully-reshardable"
        )
