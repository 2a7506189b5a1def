"""Write a folder under another name, and give it its own when it is complete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bridge.config.errors import Problem
from bridge.dist.checkpoint.folder import is_free
from bridge.dist.checkpoint.partial import claim, explain_lack_of_space, name_partial
from bridge.models.huggingface.folder.headers import INDEX
from bridge.models.huggingface.transfer.layout import FileLayout


def check_target(
    folder: Path, *, replaces: str | None = None, force: bool = False, source: Path | None = None
) -> list[Problem]:
    """Check that a folder can have this name.

    Args:
        folder: The final name.
        replaces: A file of the folders that ``force`` may replace; None if the name must be free. An empty folder is.
        force: Whether such a folder is replaced.
        source: What is read meanwhile, and must not be in the folder that is replaced.
    """
    if is_free(folder) and not folder.is_symlink():
        return []
    reason = _explain_existing(folder, replaces=replaces, force=force, source=source)
    return [] if reason is None else [Problem(str(folder), f"exists{reason}")]


def prepare(folder: Path) -> list[Problem]:
    """Make the folder that is written to under another name, in place of one that a dead run left."""
    try:
        claim(folder)
    except OSError as error:
        return [Problem(str(error.filename or name_partial(folder)), f"cannot be made: {error.strerror or error}")]
    return []


def _explain_existing(folder: Path, *, replaces: str | None, force: bool, source: Path | None) -> str | None:
    """Return why a folder is not replaced, as the end of a message; None if it is."""
    if replaces is None:
        return ": choose another folder, or remove it"
    if not (folder / replaces).is_file():
        return f", and is not replaced, as it has no {replaces}: choose another folder"
    if folder.is_symlink():
        return ", and is not replaced, as it is a symbolic link: pass the folder that it names"
    if source is not None and source.resolve().is_relative_to(folder.resolve()):
        return f", and is not replaced, as {source} is in it: choose another folder"
    return None if force else ": choose another folder, or replace it with --force"


def check_space(partial: Path, needed: int) -> list[Problem]:
    """Check that the disk has room for this many bytes."""
    try:
        lack = explain_lack_of_space(needed, shutil.disk_usage(partial).free)
    except OSError as error:  # on a node that does not share the folder
        return [describe_failure(partial, error)]
    return [] if lack is None else [Problem(str(partial), lack)]


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
