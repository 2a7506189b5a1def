"""Open a folder of transformers: its config.json, its tensors, and the match of both."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.config.documents.hub_cache import resolve_repository
from bridge.config.errors import DocumentError, Problem
from bridge.config.problems import describe_value
from bridge.dist.checkpoint.folder import is_checkpoint
from bridge.models.errors import WeightsError
from bridge.models.huggingface.config_json import load_config_json
from bridge.models.huggingface.convert import from_hf
from bridge.models.huggingface.document_fields import read_fields
from bridge.models.huggingface.folder.headers import format_tensor, read_headers
from bridge.models.huggingface.folder.match import Match, match, name_tensors
from bridge.models.huggingface.folder.names import rename
from bridge.models.huggingface.folder.stored import FP8_BLOCK, Stored, pair_scales
from bridge.models.huggingface.ignored import QUANTIZATION
from bridge.models.huggingface.matching import find_architecture
from bridge.models.huggingface.weights.sizes import Sizes


@dataclass(frozen=True)
class Folder:
    """A folder whose tensors are exactly those of the model that its config.json describes."""

    path: Path
    model_type: str
    document: dict[str, Any]
    fields: Mapping[str, Any]
    """The document by dotted path, with defaults."""

    stored: Mapping[str, Stored]
    """The tensors that are read, by the names of the weight table."""

    match: Match
    notes: list[str]


@contextlib.contextmanager
def _pause_collector() -> Iterator[None]:
    """Do not collect garbage: all objects made here stay, and visiting them repeatedly takes a third of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_pause_collector()
def open_folder(path: str | Path) -> Folder:
    """Read config.json and the headers of all tensors, and account for each of them.

    Raises:
        DocumentError: config.json is invalid, or describes a model that Megatron-Core does not have, or one whose
            weights are quantized in a way that is not read.
        WeightsError: The tensors are not those of the model: all problems, by name.
    """
    path = Path(resolve_repository(str(path)))
    if is_checkpoint(path) and not (path / "config.json").exists():
        message = "is a Megatron checkpoint: `bridge export-hf` writes one as a Hugging Face folder"
        raise WeightsError([Problem(str(path), message)])
    if path.is_file():
        raise WeightsError([Problem(str(path), "is a file: expected a folder with config.json and safetensors files")])
    config = load_config_json(str(path / "config.json"))  # not "-", which is standard input
    with config.locate_problems():
        _check_quantization(config.data)
        converted = from_hf(config.data)
    architecture = find_architecture(config.data)
    fields = read_fields(converted.data)
    sizes = Sizes(fields)
    _check_sizes(path, sizes)
    entries = list(architecture.weights(sizes))
    known = {name for entry in entries for name in name_tensors(entry)}
    stored, outside = rename(pair_scales(read_headers(path)), base=architecture.base, known=known)
    found = match(entries, stored, unused=architecture.unused_tensors)
    if found.problems:
        raise WeightsError(found.problems)
    notes = [*converted.notes, *found.notes]
    if outside:
        first = format_tensor(outside[0])
        notes.append(f"{len(outside)} tensors outside the language model are left out, {first} the first of them")
    used = {name: tensor for name, tensor in stored.items() if name in known}
    return Folder(path, architecture.model_type, converted.data, fields, used, found, notes)


def _check_quantization(config: Mapping[str, Any]) -> None:
    """Check that config.json says nothing else about quantization than what is read.

    Raises:
        DocumentError: The weights are quantized in another way.
    """
    settings = config.get(QUANTIZATION)
    if settings is None:
        return
    given = settings if isinstance(settings, dict) else {}
    method, block = given.get("quant_method"), given.get("weight_block_size", _BLOCK)
    if method not in _METHODS:
        where = f"$.{QUANTIZATION}.quant_method"
        message = f"expected one of {', '.join(_METHODS)}, got {describe_value(method)}: other weights are not read"
    elif method == "fp8" and block != _BLOCK:
        where = f"$.{QUANTIZATION}.weight_block_size"
        message = f"expected {_BLOCK}, got {json.dumps(block)[:60]}: FP8 with other blocks is not read"
    else:
        return
    raise DocumentError([Problem(where, message)])


def _check_sizes(path: Path, sizes: Sizes) -> None:
    """Check that the table of the model is not too long to be written out.

    Raises:
        WeightsError: It is.
    """
    layers = sizes.layers + sizes.encoder_layers + sizes.predictions
    parts = layers * ((sizes.experts or 0) + 3 * max(sizes.heads, sizes.groups))
    if parts > _MOST_PARTS or any(isinstance(size, int) and size > _LARGEST_SIZE for size in vars(sizes).values()):
        message = "describes a model of more layers, heads or experts, or of larger ones, than weights are read for"
        raise WeightsError([Problem(str(path / "config.json"), message)])


_MOST_PARTS = 1_000_000  # DeepSeek-V3 has 79,000; each takes 2 us and 200 bytes
_LARGEST_SIZE = 2**31
_METHODS = ("fp8", "mxfp4")
_BLOCK = [FP8_BLOCK, FP8_BLOCK]
