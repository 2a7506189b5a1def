"""Locate the ModelOpt state in checkpoints of Megatron and ModelOpt, and read the file of one rank.

Importing this module does not import ModelOpt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection

from bridge.dist import errors
from bridge.dist.checkpoint.folder import MODELOPT_STATE, find_latest
from bridge.dist.checkpoint.pickles import load_object
from bridge.models.errors import CheckpointError


def find_checkpoint(checkpoint: Path) -> Path:
    """Return the path to restore from: the latest iteration in a folder of several, otherwise ``checkpoint``.

    Raises:
        CheckpointError: The path does not exist, is not a checkpoint, or has no ModelOpt state.
    """
    if not checkpoint.exists():
        raise CheckpointError(f"there is no {checkpoint} to restore a ModelOpt state from: pass another checkpoint")
    if checkpoint.is_dir():
        try:
            checkpoint = find_latest(checkpoint)
        except errors.CheckpointError as error:
            raise CheckpointError(str(error)) from None
    if checkpoint.is_dir() and not (is_sharded(checkpoint) or any(checkpoint.glob("mp_rank_*"))):
        raise CheckpointError(
            f"{checkpoint} holds no checkpoint of Megatron: pass the folder that it was saved to, with metadata.json "
            "or mp_rank_* in it, or a file of modelopt.torch.opt.save"
        )
    if is_sharded(checkpoint) and not (checkpoint / MODELOPT_STATE).is_dir():
        raise CheckpointError(
            f"{checkpoint} has no ModelOpt state (no folder {MODELOPT_STATE}): pass the checkpoint of a model that "
            "ModelOpt changed, or set restore_modelopt_state to false"
        )
    return checkpoint


def is_sharded(checkpoint: Path) -> bool:
    """Return whether this is a Megatron distributed checkpoint."""
    return bool(dist_checkpointing.check_is_distributed_checkpoint(str(checkpoint)))


def find_rank_file(checkpoint: Path, pg_collection: ProcessGroupCollection) -> Path:
    """Return this rank's file, as Megatron names it, in a checkpoint that is not distributed.

    Raises:
        CheckpointError: The checkpoint was saved for another layout.
    """
    if checkpoint.is_file():
        ranks = pg_collection.tp.size() * pg_collection.pp.size() * pg_collection.ep.size()
        if ranks > 1:
            raise CheckpointError(
                f"{checkpoint} is the file of one rank, but {ranks} hold parts of the model: pass a distributed "
                "checkpoint, or set tp, pp and ep to 1"
            )
        return checkpoint
    # Megatron's names: mp_rank_TT, mp_rank_TT_PPP, mp_rank_TT_EEE or mp_rank_TT_PPP_EEE.
    name = f"mp_rank_{pg_collection.tp.rank():02d}"
    for group in (pg_collection.pp, pg_collection.ep):
        name += f"_{group.rank():03d}" if group.size() > 1 else ""
    file = checkpoint / name / "model_optim_rng.pt"
    if not file.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {file.relative_to(checkpoint)}: it was saved with another layout, build with that one"
        )
    return file


def read_file(file: Path) -> dict[str, Any]:
    """Read a file that torch saved. Only data and the classes that Megatron lists as safe are loaded: no code runs.

    Raises:
        CheckpointError: The file cannot be read, or is not a checkpoint.
    """
    try:
        saved: object = load_object(file, name=str(file))
    except errors.CheckpointError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(saved, dict):
        raise CheckpointError(f"{file} holds a {type(saved).__name__}, not a checkpoint: pass another file")
    return saved
