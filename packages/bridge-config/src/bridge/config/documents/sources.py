"""Read the text of a document from a file, a preset or standard input."""

from __future__ import annotations

import os
import stat
import sys
from functools import partial
from itertools import islice
from pathlib import Path as FilePath

from bridge.config.documents.presets import find_preset, list_presets, list_unreadable
from bridge.config.errors import DocumentError, Problem, find_closest
from bridge.config.text.limits import MAX_BYTES

STANDARD_INPUT = "-"
"""The name for standard input in place of a file."""

SUFFIXES = (".yaml", ".yml", ".json")
_CHUNK = 2**16


def is_source(text: str) -> bool:
    """Return whether `text` names an existing file, a preset or standard input."""
    return text == STANDARD_INPUT or os.path.exists(text) or find_preset(text) is not None


def is_preset(source: str) -> bool:
    """Return whether `source` must be a preset: it has no document suffix, or there is a preset but no file."""
    return FilePath(source).suffix not in SUFFIXES or (not os.path.exists(source) and source in list_presets())


def read_source(source: str) -> str:
    """Return the text of a file, a preset or standard input.

    Raises:
        DocumentError: the source cannot be read.
    """
    check_name(source)
    return _read_preset(source) if source != STANDARD_INPUT and is_preset(source) else read_file(source)


def read_file(source: str) -> str:
    """Return the text of a file, or of standard input for `-`.

    Raises:
        DocumentError: the file cannot be read, is not a regular file, is too large, or is not UTF-8.
    """
    check_name(source)
    if source == STANDARD_INPUT and sys.stdin is None:
        raise make_source_error(source, "cannot be read: standard input is closed")
    try:
        if source == STANDARD_INPUT:
            return _decode(sys.stdin.buffer.read(MAX_BYTES + 1), source)
        if not stat.S_ISREG(os.stat(source).st_mode):  # a pipe or device may block forever, or act when opened
            raise make_source_error(source, "cannot be read: not a regular file")
        with open(source, "rb") as stream:
            # In chunks: one read of MAX_BYTES + 1 would allocate that much for every small file.
            chunks = iter(partial(stream.read, _CHUNK), b"")
            return _decode(b"".join(islice(chunks, MAX_BYTES // _CHUNK + 1)), source)
    except FileNotFoundError as error:
        raise make_source_error(source, f"no such file{suggest_source(source)}") from error
    except OSError as error:
        raise make_source_error(source, f"cannot be read: {error.strerror or error}") from error


def suggest_source(source: str) -> str:
    """Return the end of a message about a missing source: the closest file or preset name, or an empty string."""
    file = FilePath(source)
    try:
        entries = os.listdir(file.parent)
    except OSError:
        entries = []
    found = {os.path.splitext(entry)[0]: entry for entry in sorted(entries) if entry.endswith(SUFFIXES)}
    if source == file.name:
        found |= {name: name for name in list_presets() if name not in found}
    close = find_closest(file.stem if file.suffix in SUFFIXES else file.name, found)
    suggestion = source if close is None else source.removesuffix(file.name) + found[close]
    return "" if suggestion == source else f"; did you mean {suggestion!r}?"


def check_name(source: str) -> None:
    """Check that `source` is a valid file name.

    Raises:
        DocumentError: it is not.
    """
    try:
        is_name = b"\0" not in os.fsencode(source)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise make_source_error(ascii(source), "not a valid file name")


def make_source_error(source: str, message: str) -> DocumentError:
    """Return an error about a whole source."""
    return DocumentError([Problem("$", message, source)])


def _read_preset(name: str) -> str:
    if (found := find_preset(name)) is not None:
        return _decode(found.read_bytes(), name)
    if os.path.exists(name):
        raise make_source_error(name, "expected a .yaml, .yml or .json file: rename it")
    known = list_presets()
    presets = f"the presets are {', '.join(known)}" if known else "presets come with bridge-models"
    near = suggest_source(name) or f"; {presets}"
    raise make_source_error(name, "; ".join([f"no such file or preset{near}", *list_unreadable()]))


def _decode(raw: bytes, source: str) -> str:
    if len(raw) > MAX_BYTES:
        raise make_source_error(source, f"larger than {MAX_BYTES // 2**20} MiB")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise make_source_error(source, f"not valid UTF-8 (byte {error.start})") from error
