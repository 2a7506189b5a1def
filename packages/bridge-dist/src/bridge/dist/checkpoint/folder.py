"""The folder of a Megatron checkpoint: one folder per iteration, and a file that names the latest."""

from __future__ import annotations

import json
from pathlib import Path

from bridge.dist.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
METADATA = ".metadata"
FORMAT = "metadata.json"
DOCUMENT = "bridge.yaml"
RUN_CONFIG = "run_config.yaml"
RELEASE = "release"
"""The folder of a checkpoint that no training run wrote: Megatron starts at iteration 0 and asks for no optimizer."""


def name_iteration(step: int) -> str:
    """Return the name that Megatron gives the folder of an iteration."""
    return f"iter_{step:07d}"


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds a Megatron checkpoint, or is the folder of one iteration."""
    return (folder / TRACKER).is_file() or (folder / FORMAT).is_file()


def find_iteration(folder: Path) -> Path:
    """Return the folder of the latest iteration; ``folder`` itself if it is that of an iteration.

    Raises:
        CheckpointError: There is none, or it is of another format.
    """
    iteration = folder
    if (folder / TRACKER).is_file():
        latest = (folder / TRACKER).read_text(errors="replace").strip()
        if latest != RELEASE and not (latest.isascii() and latest.isdecimal()):
            raise CheckpointError(f"{folder / TRACKER} must hold the number of an iteration, got {latest[:40]!r}")
        iteration = folder / (RELEASE if latest == RELEASE else name_iteration(int(latest)))
    if not iteration.is_dir():
        raise CheckpointError(f"there is no folder {iteration}: pass the folder of a Megatron checkpoint")
    _check_format(iteration)
    return iteration


def _check_format(iteration: Path) -> None:
    """Check that an iteration is in the format torch_dist.

    Raises:
        CheckpointError: It is not.
    """
    file = iteration / FORMAT
    try:
        backend = json.loads(file.read_text())["sharded_backend"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{iteration} has no {FORMAT}, so it is not a checkpoint in Megatron's format torch_dist: save it with "
            "--ckpt-format torch_dist"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from None
    if backend != "torch_dist":
        raise CheckpointError(f"{iteration} is in the format {backend!r}: save it with --ckpt-format torch_dist")
