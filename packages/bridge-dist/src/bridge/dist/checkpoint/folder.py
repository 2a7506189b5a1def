"""The folder of a Megatron checkpoint: one folder per iteration, and a file that names the latest."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import BinaryIO

from bridge.dist.errors import CheckpointError

MODELOPT_STATE = "modelopt_state"
"""The folder of ModelOpt's state in an iteration."""

TRACKER = "latest_checkpointed_iteration.txt"
METADATA = ".metadata"
FORMAT = "metadata.json"
DOCUMENT = "bridge.yaml"
RUN_CONFIG = "run_config.yaml"
TRAIN_STATE = "train_state.pt"
"""The steps and samples of an iteration, as Megatron Bridge writes them."""
BRIDGE_TRACKER = f"latest_{TRAIN_STATE}"
"""Those of the latest one, beside the iterations: Megatron Bridge's tracker file."""
RELEASE = "release"
"""The folder of a checkpoint that no training run wrote: Megatron starts at iteration 0 and asks for no optimizer."""

_LARGEST_TEXT = 100_000  # bytes
_MOST_DIGITS = 20  # of an iteration


def name_iteration(step: int) -> str:
    """Return the name that Megatron gives the folder of an iteration."""
    return f"iter_{step:07d}"


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds a Megatron checkpoint, or is the folder of one iteration."""
    return any((folder / name).is_file() for name in (TRACKER, BRIDGE_TRACKER, FORMAT))


def has_modelopt_state(folder: Path) -> bool:
    """Return whether a folder holds a Megatron checkpoint of a model that ModelOpt changed.

    Raises:
        CheckpointError: It holds no readable checkpoint.
    """
    return is_checkpoint(folder) and (find_iteration(folder) / MODELOPT_STATE).is_dir()


def find_iteration(folder: Path) -> Path:
    """Return the folder of the latest iteration, in the format torch_dist; ``folder`` itself if it is that of one.

    Raises:
        CheckpointError: There is none, or it is of another format.
    """
    iteration = find_latest(folder)
    _check_format(iteration)
    return iteration


def find_latest(folder: Path) -> Path:
    """Return the folder of the latest iteration, in any format; ``folder`` itself if no file names the latest.

    Raises:
        CheckpointError: There is none.
    """
    iteration = folder
    if (folder / TRACKER).is_file():
        try:
            with open_regular(folder / TRACKER, limit=_LARGEST_TEXT) as opened:
                latest = opened.read().decode(errors="replace").strip()
        except OSError as error:
            raise CheckpointError(f"{folder / TRACKER}: {error.strerror or error}") from None
        if latest != RELEASE and not (latest.isascii() and latest.isdecimal() and len(latest) < _MOST_DIGITS):
            raise CheckpointError(f"{folder / TRACKER} must hold the number of an iteration, got {latest[:40]!r}")
        iteration = folder / (RELEASE if latest == RELEASE else name_iteration(int(latest)))
    elif (folder / BRIDGE_TRACKER).is_file():  # it is a pickle; Megatron Bridge writes no text
        iteration = max(folder.glob("iter_" + "[0-9]" * 7), default=folder / "iter_*")
    if not iteration.is_dir():
        raise CheckpointError(f"there is no folder {iteration}: pass the folder of a Megatron checkpoint")
    return iteration


def is_free(folder: Path) -> bool:
    """Return whether a folder can have this name: nothing else has it, or an empty folder."""
    return not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))


def check_save_folder(folder: Path, loaded: Path | None) -> None:
    """Check that a folder to save to is new, empty, or that of the run that goes on.

    Raises:
        CheckpointError: It is another one.
    """
    if is_free(folder):
        return
    if (
        loaded is None
        or not folder.is_dir()
        or not any(os.path.samefile(folder, one) for one in (loaded, loaded.parent))
    ):
        raise CheckpointError(f"{folder} exists: choose another folder, --load it to go on from it, or give --force")


def open_regular(file: Path, *, limit: int) -> BinaryIO:
    """Open a file of at most so many bytes. A pipe could block forever.

    Raises:
        OSError: It cannot be opened, is no regular file, or is larger.
    """
    opened = open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115 - it is returned
    found = os.fstat(opened.fileno())
    if stat.S_ISREG(found.st_mode) and found.st_size <= limit:
        return opened
    opened.close()
    raise OSError(errno.EINVAL, f"is no regular file of at most {limit:,} bytes", str(file))


def _check_format(iteration: Path) -> None:
    """Check that an iteration is in the format torch_dist.

    Raises:
        CheckpointError: It is not.
    """
    file = iteration / FORMAT
    try:
        with open_regular(file, limit=_LARGEST_TEXT) as opened:
            backend = json.load(opened)["sharded_backend"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{iteration} has no {FORMAT}, so it is not a checkpoint in Megatron's format torch_dist: save it with "
            "--ckpt-format torch_dist"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from None
    if backend != "torch_dist":
        raise CheckpointError(f"{iteration} is in the format {backend!r}: save it with --ckpt-format torch_dist")
