"""A folder while it is written: ``NAME.partial``, which belongs to one run and gets its name when it is complete."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from bridge.dist.formatting import format_bytes

MAKE_ROOM = "free some space on this disk, or write to another folder"
"""What to do about a disk that is full."""

_LOCK = ".lock"

_locks: dict[Path, int] = {}
"""The lock of each partial folder that this process writes. The system unlocks those of a process that dies."""


def name_partial(folder: Path) -> Path:
    """Return the name of a folder while it is written."""
    return Path(f"{os.path.abspath(folder)}.partial")


def claim(folder: Path) -> Path:
    """Make the folder that is written to, empty: one that a dead run left is cleared.

    Raises:
        OSError: It cannot be made, or another run writes to it.
    """
    partial = name_partial(folder)
    _release(partial)  # an earlier try of this process
    with suppress(FileExistsError):
        partial.mkdir(parents=True)
    if partial.is_symlink() or not partial.is_dir():
        raise FileExistsError(errno.EEXIST, "exists and is no folder: remove it", str(partial))
    lock = os.open(partial / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        message = "another run is writing to it: save to another folder, or wait for its end"
        raise FileExistsError(errno.EEXIST, message, str(partial)) from None
    except OSError:  # a file system without locks
        pass
    _locks[partial] = lock
    for entry in partial.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()
    return partial


def explain_lack_of_space(needed: int, free: int) -> str | None:
    """Return what is wrong with writing so many bytes to a disk with so many free; None if it has room for them."""
    if needed <= free:
        return None
    return f"needs {format_bytes(needed)}, but the disk has {format_bytes(free)} left: {MAKE_ROOM}"


def finish(folder: Path) -> None:
    """Give a folder that is complete its name, in place of the folder that has it, which is removed last.

    What was written is on the disk before the name changes: after a crash of the machine, too, it means all of it.
    """
    folder = Path(os.path.abspath(folder))
    partial = name_partial(folder)
    for path, _, files in os.walk(partial):
        for name in (*files, ""):
            sync(Path(path, name))
    with ExitStack() as stack:
        if os.path.lexists(folder):
            replaced = TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.replaced.")
            folder.rename(Path(stack.enter_context(replaced), folder.name))
        partial.rename(folder)
    (folder / _LOCK).unlink(missing_ok=True)
    _release(partial)
    sync(folder.parent)


def replace_file(file: Path, text: str) -> None:
    """Write a file, in place of one of this name, at once."""
    partial = name_partial(file)
    partial.write_text(text)
    sync(partial)
    partial.replace(file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _release(partial: Path) -> None:
    if partial in _locks:
        os.close(_locks.pop(partial))
