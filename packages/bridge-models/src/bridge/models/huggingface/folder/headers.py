"""The tensors of a folder, from the headers of its safetensors files and its index."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bridge.config.errors import Problem, quote_name
from bridge.models.errors import WeightsError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_model.safetensors"
_OTHER_FORMATS = {
    ".bin": "PyTorch's pickled weights",
    ".pt": "PyTorch's pickled weights",
    ".pth": "PyTorch's pickled weights",
    ".gguf": "GGUF",
    ".h5": "TensorFlow's weights",
    ".msgpack": "Flax's weights",
}


@dataclass(slots=True)  # not frozen: that takes four times as long, and DeepSeek-V3 has 91,991
class Header:
    """What the header of a file says about one tensor."""

    file: Path
    name: str
    dtype: str
    """As safetensors spells it: ``BF16``, ``F8_E4M3``, ..."""

    shape: tuple[int, ...]


def read_headers(folder: Path) -> dict[str, Header]:
    """Return the tensors of a folder by name. A single file is preferred over an index, as in transformers.

    safetensors checks each header against the size of its file before it returns anything.

    Raises:
        WeightsError: The folder has no safetensors files, a file is broken, or the index does not fit the files.
    """
    index = folder / INDEX
    if os.path.isfile(folder / SINGLE):
        return _read_files(folder, {SINGLE: None})
    if not os.path.lexists(index):
        raise WeightsError([Problem(str(folder), _explain_missing(folder))])
    listed = _read_index(index)
    files: dict[str, set[str]] = {}
    for name, file in listed.items():
        files.setdefault(file, set()).add(name)
    return _read_files(folder, dict(sorted(files.items())))


def format_tensor(name: str) -> str:
    """Return the name of a tensor as messages have it: on one line, of a limited length."""
    return name if name.isprintable() and len(name) <= _MAX_NAME_LENGTH else quote_name(name)


_MAX_NAME_LENGTH = 200
_MAX_TENSORS = 1_000_000  # DeepSeek-V3 has 91,991


def _read_files(folder: Path, files: Mapping[str, Set[str] | None]) -> dict[str, Header]:
    """Read the headers of files, each with the tensors that the index says it has; None if there is no index."""
    headers: dict[str, Header] = {}
    problems = []
    for name, listed in files.items():
        file = folder / name
        try:
            found = {header.name: header for header in islice(_read_file(file), _MAX_TENSORS - len(headers))}
        except (SafetensorError, OSError) as error:
            problems.append(Problem(str(file), _explain_broken(file, error)))
            continue
        if listed is not None and listed != found.keys():
            missing, unlisted = sorted(listed - found.keys()), sorted(found.keys() - listed)
            problems += [
                Problem(str(file), f"{format_tensor(one)} is missing, but listed in {INDEX}") for one in missing
            ]
            problems += [
                Problem(str(file), f"{format_tensor(one)} is not listed in {INDEX} for this file") for one in unlisted
            ]
        headers |= found
        if len(headers) >= _MAX_TENSORS:
            raise WeightsError([Problem(str(file), f"the folder has {_MAX_TENSORS:,} tensors or more")])
    if problems:
        raise WeightsError(problems)
    return headers


def _read_file(file: Path) -> Iterator[Header]:
    _check_regular(file)
    with safe_open(file, framework="np") as opened:
        get_slice = opened.get_slice
        for name in sorted(opened.keys()):
            described = get_slice(name)
            yield Header(file, name, described.get_dtype(), tuple(described.get_shape()))


def _check_regular(file: Path) -> None:
    """Check that a file is a regular one: a pipe would block, and a device may act when it is opened.

    Raises:
        OSError: It is not.
    """
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError("not a regular file")


def _explain_broken(file: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"missing, but listed in {INDEX}"
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    with file.open("rb") as stream:
        if stream.read(len(_GIT_LFS)) == _GIT_LFS:
            return "is a Git LFS pointer: fetch the file itself with `git lfs pull`"
    return f"truncated or invalid safetensors file: {format_tensor(str(error))}"


_GIT_LFS = b"version https://git-lfs"


def _read_index(index: Path) -> dict[str, str]:
    """Return the file of each tensor.

    Raises:
        WeightsError: The index cannot be read, or does not map tensors to files of its folder.
    """
    try:
        _check_regular(index)
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise OSError(f"larger than {_MAX_INDEX_BYTES:,} bytes")
        read = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_make_mapping)
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise WeightsError([Problem(str(index), f"cannot be read as JSON: {reason}")]) from error
    listed = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise WeightsError([Problem(str(index), "expected weight_map, a mapping from tensors to files")])
    outside = sorted(name for name in set(listed.values()) if not _FILE.fullmatch(name))
    if outside:
        message = f"names {quote_name(outside[0])}: expected a safetensors file of this folder"
        raise WeightsError([Problem(str(index), message)])
    return listed


_MAX_INDEX_BYTES = 30_000_000  # bytes: reading JSON takes twenty times its size; DeepSeek-V3's has 9 MB


def _make_mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("duplicate key")
    return mapping


_FILE = re.compile(r"[\w.+-]{1,200}\.safetensors", re.ASCII)


def _explain_missing(folder: Path) -> str:
    """Return what a folder without an index or a readable single file has instead."""
    if not folder.is_dir():
        return f"expected a folder with config.json and {SINGLE}"
    files = sorted(folder.iterdir())
    if os.path.lexists(folder / SINGLE):
        return f"{SINGLE} is {'not a regular file' if os.path.exists(folder / SINGLE) else 'a link to nothing'}"
    if (folder / _ADAPTER).exists():
        return f"has {_ADAPTER}, the changes to another model: merge them into it with PEFT, and save it"
    for file in files:
        if file.suffix == ".safetensors":
            return f"has {quote_name(file.name)}, but neither {SINGLE} nor {INDEX}"
    for file in files:
        if file.suffix in _OTHER_FORMATS:
            return (
                f"has no {SINGLE}, and {quote_name(file.name)} is {_OTHER_FORMATS[file.suffix]}, which is not read: "
                "load it with transformers and save it with save_pretrained"
            )
    return f"has neither {SINGLE} nor {INDEX}"
