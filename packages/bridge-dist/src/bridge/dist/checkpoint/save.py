"""Save the stages of all ranks as a Megatron checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

from bridge.config import Document, ModelConfig
from bridge.dist.checkpoint.common import make_common_state
from bridge.dist.checkpoint.document import write_documents
from bridge.dist.checkpoint.folder import TRACKER, name_iteration
from bridge.dist.checkpoint.progress import Progress
from bridge.dist.checkpoint.random_states import KEY, collect_random_states
from bridge.dist.checkpoint.state import (
    OPTIMIZER,
    add_groups,
    check_wrapper,
    make_content_metadata,
    make_model_state,
    uses_distributed_optimizer,
)
from bridge.dist.checkpoint.together import gather, raise_together
from bridge.dist.errors import CheckpointError


def save_checkpoint(
    stages: Sequence[MegatronModule],
    folder: str | Path,
    pg_collection: ProcessGroupCollection,
    *,
    model: ModelConfig,
    progress: Progress,
    optimizer: Any = None,
) -> Path:
    """Save the stages of all ranks in megatron-core's format torch_dist, laid out as Megatron-LM and Bridge expect.

    Collective over all ranks. The iteration gets its name when it is complete, and the tracker file names it last: a
    run that dies leaves ``iter_NNNNNNN.partial``, which nothing takes for a checkpoint and the next run replaces.

    Args:
        stages: The stages of this rank, wrapped or not.
        folder: The folder of all iterations.
        pg_collection: The process groups of this rank.
        model: The configuration of the model, written as a document and as Megatron Bridge's ``run_config.yaml``.
        progress: Steps taken, which is Megatron's iteration, and samples trained on, after which data go on.
        optimizer: Megatron's optimizer of the stages; None to save only weights.

    Returns:
        The folder of the iteration.

    Raises:
        CheckpointError: The iteration exists, a rank cannot write it, or the wrapper has no such checkpoint.
    """
    iteration = Path(folder) / name_iteration(progress.step)
    partial = iteration.with_name(f"{iteration.name}.partial")
    is_first = torch.distributed.get_rank() == 0
    check_target(folder, progress.step)
    with raise_together():
        check_wrapper(stages)
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)  # of an earlier run
            partial.mkdir(parents=True)
    distributed_optimizer = optimizer is not None and uses_distributed_optimizer(stages)
    content = make_content_metadata(distributed_optimizer=distributed_optimizer)
    metadata = add_groups(content, pg_collection)
    state = make_model_state(stages, metadata)
    if optimizer is not None:
        state[OPTIMIZER] = optimizer.sharded_state_dict(state, metadata=metadata)
    state[KEY] = collect_random_states(pg_collection)
    state |= make_common_state(
        stages[0].config,
        step=progress.step,
        samples=progress.samples,
        world_size=torch.distributed.get_world_size(),
        tensor=pg_collection.tp.size(),
        pipeline=pg_collection.pp.size(),
        data=pg_collection.dp.size(),
        distributed_optimizer=distributed_optimizer,
        **({"no_save_optim": True} if optimizer is None else {}),
    )
    _check_space(state, partial)
    with raise_together():
        dist_checkpointing.save(state, str(partial), content_metadata=content)
        if is_first:
            write_documents(Document(model.as_dict()), partial)
            partial.rename(iteration)
            _write_tracker(iteration, progress.step)
    return iteration


def check_target(folder: str | Path, step: int) -> None:
    """Check that a checkpoint of this step can be written, before training for it. Collective over all ranks.

    Raises:
        CheckpointError: There is one, or the folder cannot be made.
    """
    with raise_together():
        if torch.distributed.get_rank() == 0:
            iteration = Path(folder) / name_iteration(step)
            if iteration.exists():
                raise CheckpointError(f"{iteration} exists: save to another folder, or remove it")
            iteration.parent.mkdir(parents=True, exist_ok=True)


def _check_space(state: dict[str, Any], folder: Path) -> None:
    """Check that the tensors of all ranks fit on the disk. Collective over all ranks.

    Raises:
        CheckpointError: They do not.
    """
    parts = [one for one in nested_values(state) if isinstance(one, ShardedTensor | ShardedTensorFactory)]
    tensors = [part.data for part in parts if is_main_replica(part.replica_id)]
    mine: int = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    needed = sum(gather(mine))
    with raise_together() as problems:
        free = shutil.disk_usage(folder).free
        if needed > free:
            problems.append(f"{folder} needs {needed / 1e9:,.3f} GB, but the disk has {free / 1e9:,.3f} GB left")


def _write_tracker(iteration: Path, step: int) -> None:
    """Write the name of the latest iteration, at once."""
    written = iteration.parent / f"{TRACKER}.partial"
    written.write_text(str(step))
    os.replace(written, iteration.parent / TRACKER)
