"""The tensors of a folder, from the headers of its safetensors files and its index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from bridge.config.errors import Problem, quote_name
from bridge.models.errors import WeightsError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OTHER_FORMATS = {
    ".bin": "PyTorch's pickled weights",
    ".pt": "PyTorch's pickled weights",
    ".pth": "PyTorch's pickled weights",
    ".gguf": "GGUF",
    ".h5": "TensorFlow's weights",
    ".msgpack": "Flax's weights",
}


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a file says about one tensor."""

    file: Path
    name: str
    dtype: str
    """As safetensors spells it: ``BF16``, ``F8_E4M3``, ..."""

    shape: tuple[int, ...]


def read_headers(folder: Path) -> dict[str, Header]:
    """Return the tensors of a folder by name.

    safetensors checks each header against the size of its file before it returns anything.

    Raises:
        WeightsError: The folder has no safetensors files, a file is broken, or the index does not fit the files.
    """
    index = folder / INDEX
    listed = _read_index(index) if index.is_file() else None
    files = sorted(set(listed.values())) if listed is not None else [SINGLE]
    if listed is None and not (folder / SINGLE).is_file():
        raise WeightsError([Problem(str(folder), _explain_missing(folder))])
    headers: dict[str, Header] = {}
    problems = []
    for name in files:
        try:
            for header in _read_file(folder / name):
                if listed is not None and listed.get(header.name) != name:
                    problems.append(Problem(str(folder / name), _explain_unlisted(header.name, listed)))
                headers[header.name] = header
        except FileNotFoundError:
            problems.append(Problem(str(index), f"names {quote_name(name)}, which is not in the folder"))
        except (SafetensorError, OSError) as error:
            problems.append(Problem(str(folder / name), f"is not a whole safetensors file: {error}"))
    if not problems and listed is not None:
        missing = sorted(set(listed) - set(headers))
        problems += [
            Problem(str(index), f"says that {listed[name]} has {quote_name(name)}, which it has not")
            for name in missing
        ]
    if problems:
        raise WeightsError(problems)
    return headers


def _read_file(file: Path) -> Iterator[Header]:
    if not file.is_file():
        raise FileNotFoundError(file)
    with safe_open(file, framework="np") as opened:
        for name in opened.keys():  # noqa: SIM118 - it is no mapping
            described = opened.get_slice(name)
            yield Header(file, name, described.get_dtype(), tuple(described.get_shape()))


def _read_index(index: Path) -> dict[str, str]:
    try:
        read = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError([Problem(str(index), f"cannot be read as JSON: {error}")]) from error
    listed = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise WeightsError([Problem(str(index), "expected weight_map, a mapping from tensors to files")])
    outside = [name for name in listed.values() if Path(name).name != name or not name.endswith(".safetensors")]
    if outside:
        message = f"names {quote_name(outside[0])}: expected a safetensors file of this folder"
        raise WeightsError([Problem(str(index), message)])
    return listed


def _explain_unlisted(name: str, listed: dict[str, str]) -> str:
    where = f"the index says it is in {listed[name]}" if name in listed else "the index does not list it"
    return f"has the tensor {quote_name(name)}, but {where}"


def _explain_missing(folder: Path) -> str:
    if not folder.is_dir():
        return "expected a folder with config.json and model.safetensors"
    for file in sorted(folder.iterdir()):
        if file.suffix in _OTHER_FORMATS:
            return (
                f"has no {SINGLE}, and {file.name} is {_OTHER_FORMATS[file.suffix]}, which is not read: "
                "load it with transformers and save it with save_pretrained"
            )
    return f"has neither {SINGLE} nor {INDEX}"
