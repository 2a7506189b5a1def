"""Locate the ModelOpt state in checkpoints of Megatron and ModelOpt, and read the file of one rank.

Importing this module does not import ModelOpt.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.safe_globals import SAFE_GLOBALS

from bridge.models.errors import CheckpointError

_ITERATION = "latest_checkpointed_iteration.txt"


def locate(checkpoint: Path) -> Path:
    """Return what to restore from: the latest iteration in a folder of several, or what is given.

    Raises:
        CheckpointError: There is nothing, or nothing with a ModelOpt state.
    """
    if not checkpoint.exists():
        raise CheckpointError(f"there is no {checkpoint} to restore a ModelOpt state from: give another checkpoint")
    if (checkpoint / _ITERATION).is_file():
        latest = (checkpoint / _ITERATION).read_text().strip()
        return locate(checkpoint / ("release" if latest == "release" else f"iter_{int(latest):07d}"))
    if checkpoint.is_dir() and not (is_sharded(checkpoint) or any(checkpoint.glob("mp_rank_*"))):
        raise CheckpointError(
            f"{checkpoint} holds no checkpoint of Megatron: give the folder that it was saved into, with metadata.json "
            "or mp_rank_* in it, or a file of modelopt.torch.opt.save"
        )
    if is_sharded(checkpoint) and not (checkpoint / "modelopt_state").is_dir():
        raise CheckpointError(
            f"{checkpoint} has no ModelOpt state (no folder modelopt_state): give the checkpoint of a model that "
            "ModelOpt changed, or set restore_modelopt_state to false"
        )
    return checkpoint


def is_sharded(checkpoint: Path) -> bool:
    """Return whether this is a Megatron distributed checkpoint."""
    return bool(dist_checkpointing.check_is_distributed_checkpoint(str(checkpoint)))


def file_of_rank(checkpoint: Path, pg_collection: ProcessGroupCollection) -> Path:
    """Return the file of this rank, as Megatron names it, in a folder that is no distributed checkpoint."""
    if checkpoint.is_file():
        ranks = pg_collection.tp.size() * pg_collection.pp.size() * pg_collection.ep.size()
        if ranks > 1:
            raise CheckpointError(
                f"{checkpoint} is the file of one rank, but {ranks} hold parts of the model: give a distributed "
                "checkpoint, or set tp, pp and ep to 1"
            )
        return checkpoint
    name = f"mp_rank_{pg_collection.tp.rank():02d}"
    for group in (pg_collection.pp, pg_collection.ep):
        name += f"_{group.rank():03d}" if group.size() > 1 else ""
    file = checkpoint / name / "model_optim_rng.pt"
    if not file.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {file.relative_to(checkpoint)}: it was saved under another layout, build under that"
        )
    return file


def read_file(file: Path) -> dict[str, Any]:
    """Read what was saved with torch: data alone, and the few classes that Megatron puts into its checkpoints."""
    try:
        with torch.serialization.safe_globals(cast(list[Any], SAFE_GLOBALS)):
            saved: object = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(saved, dict):
        raise CheckpointError(f"{file} holds a {type(saved).__name__}, not a checkpoint: give another file")
    return saved
