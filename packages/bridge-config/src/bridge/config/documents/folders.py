"""Read folders of other programs as documents, by functions that installed distributions declare.

An entry point of the group `bridge.folders` has the name of a file, such as `config.json`, and a function that reads a
folder with that file: `(path) -> Document`. Entry points are read only if the source of a document is a folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path as FilePath
from typing import Any

from bridge.config.documents.presets import find_preset
from bridge.config.documents.sources import STANDARD_INPUT, SUFFIXES, make_source_error

GROUP = "bridge.folders"


def is_folder(source: str) -> bool:
    """Return whether `source` is a folder. The name of a preset is the preset: `./name` is the folder."""
    return source != STANDARD_INPUT and os.path.isdir(source) and find_preset(source) is None


def find_folder_reader(source: str) -> Callable[[str], Any]:
    """Return the function that reads a folder as a `Document`.

    Raises:
        DocumentError: no installed distribution reads this folder.
    """
    points = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    for point in points:
        if os.path.lexists(os.path.join(source, point.name)):
            reader: Callable[[str], Any] = point.load()
            return reader
    hint = _suggest_documents(source)
    if not points:
        raise make_source_error(source, f"is a folder: to read Hugging Face folders, pip install bridge-models{hint}")
    *others, last = [point.name for point in points]
    expected = f"{', '.join(others)} or {last}" if others else last
    raise make_source_error(source, f"is a folder without {expected}: give a document, or a folder that has one{hint}")


def _suggest_documents(folder: str) -> str:
    """Return the end of a message about a folder: how to validate the documents in it, or an empty string."""
    for suffix in SUFFIXES:
        if any(FilePath(folder).glob(f"*{suffix}")):
            return f"; to validate the documents in it, give {os.path.join(folder, f'*{suffix}')}"
    return ""
