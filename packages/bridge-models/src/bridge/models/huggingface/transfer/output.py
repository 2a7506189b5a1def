"""Write a folder under another name, and give it its own when it is complete."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bridge.config.errors import Problem
from bridge.models.huggingface.folder.headers import INDEX
from bridge.models.huggingface.transfer.layout import FileLayout

CARRIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files of a folder that belong to its tokenizer and to generation."""


def name_partial(folder: Path) -> Path:
    """Return the name of a folder while it is written."""
    return Path(f"{os.path.abspath(folder)}.partial")


def prepare(folder: Path, *, replaces: str | None = None) -> list[Problem]:
    """Make the folder that is written to, in place of one that an earlier run left.

    Args:
        folder: The final name.
        replaces: A file of the folders that may be replaced; None if the name must be free.
    """
    if os.path.lexists(folder):
        if replaces is None:
            return [Problem(str(folder), "exists: choose another folder, or remove it")]
        if not (folder / replaces).is_file():
            return [Problem(str(folder), f"is not replaced, as it has no {replaces}: choose another folder")]
        if folder.is_symlink():
            return [Problem(str(folder), "is not replaced, as it is a symbolic link: pass the folder that it names")]
    partial = name_partial(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        return [Problem(str(partial), f"cannot be made: {error.strerror or error}")]
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


def carry_files(source: Path, folder: Path) -> None:
    """Copy the files of the tokenizer and of generation that a folder has."""
    for name in CARRIED:
        if (source / name).is_file():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def finish(folder: Path) -> None:
    """Give a folder that is complete its name, in place of the folder that has it, which is removed last."""
    folder = Path(os.path.abspath(folder))
    with ExitStack() as stack:
        if os.path.lexists(folder):
            replaced = TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.replaced.")
            folder.rename(Path(stack.enter_context(replaced), folder.name))
        name_partial(folder).rename(folder)
