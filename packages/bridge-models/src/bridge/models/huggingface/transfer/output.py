"""Write a folder under another name, and give it its own when it is complete."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from bridge.config.errors import Problem
from bridge.dist.checkpoint.partial import claim, name_partial
from bridge.models.huggingface.folder.headers import INDEX
from bridge.models.huggingface.transfer.layout import FileLayout


def prepare(folder: Path, *, replaces: str | None = None, force: bool = False) -> list[Problem]:
    """Make the folder that is written to, in place of one that a dead run left.

    Args:
        folder: The final name.
        replaces: A file of the folders that ``force`` may replace; None if the name must be free.
        force: Whether such a folder is replaced.
    """
    if os.path.lexists(folder):
        if replaces is None:
            return [Problem(str(folder), "exists: choose another folder, or remove it")]
        if not force:
            return [Problem(str(folder), "exists: choose another folder, or replace it with --force")]
        if not (folder / replaces).is_file():
            return [Problem(str(folder), f"is not replaced, as it has no {replaces}: choose another folder")]
        if folder.is_symlink():
            return [Problem(str(folder), "is not replaced, as it is a symbolic link: pass the folder that it names")]
    try:
        claim(folder)
    except OSError as error:
        return [Problem(str(error.filename or name_partial(folder)), f"cannot be made: {error.strerror or error}")]
    return []


def check_space(partial: Path, needed: int) -> list[Problem]:
    """Check that the disk has room for this many bytes."""
    try:
        free = shutil.disk_usage(partial).free
    except OSError as error:  # on a node that does not share the folder
        return [describe_failure(partial, error)]
    if needed <= free:
        return []
    return [Problem(str(partial), f"needs {needed / 1e9:,.1f} GB, but the disk has {free / 1e9:,.1f} GB left")]


def describe_failure(folder: Path, error: OSError) -> Problem:
    """Return why the file system does not let a folder be written."""
    return Problem(str(folder), f"cannot be written: {error.strerror or error}")


def write_headers(partial: Path, layout: FileLayout, config: dict[str, Any]) -> None:
    """Write the headers of the tensors' files, the index and config.json."""
    for file, header in layout.headers.items():
        with (partial / file).open("r+b") as opened:
            opened.write(header)
    if (index := layout.make_index()) is not None:
        (partial / INDEX).write_bytes(index)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
