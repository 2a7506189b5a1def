"""Open a folder of transformers: its config.json, its tensors, and the match of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.config.errors import Problem
from bridge.models.errors import WeightsError
from bridge.models.huggingface.config_json import load_config_json
from bridge.models.huggingface.convert import from_hf
from bridge.models.huggingface.document_fields import read_fields
from bridge.models.huggingface.folder.headers import read_headers
from bridge.models.huggingface.folder.match import Match, match
from bridge.models.huggingface.folder.stored import Stored, pair_scales, rename
from bridge.models.huggingface.ignored import QUANTIZATION
from bridge.models.huggingface.matching import find_architecture
from bridge.models.huggingface.weights.sizes import Sizes
from bridge.models.huggingface.weights.weight import Weight

_READABLE = (None, "fp8", "mxfp4")


@dataclass(frozen=True)
class Folder:
    """A folder whose tensors are exactly those of the model that its config.json describes."""

    path: Path
    document: dict[str, Any]
    fields: Mapping[str, Any]
    """The document by dotted path, with defaults."""

    stored: Mapping[str, Stored]
    """Its tensors by the names of the weight table."""

    match: Match
    notes: list[str]


def open_folder(path: str | Path) -> Folder:
    """Read config.json and the headers of all tensors, and account for each of them.

    Raises:
        DocumentError: config.json is invalid, or describes a model that Megatron-Core does not have.
        WeightsError: The tensors are not those of the model: all problems, by name.
    """
    path = Path(path)
    config = load_config_json(str(path)).data
    _check_quantization(path, config)
    converted = from_hf(config)
    architecture = find_architecture(config)
    fields = read_fields(converted.data)
    entries = list(architecture.weights(Sizes(fields)))
    embedding = next(one for one in entries if isinstance(one, Weight)).forms[0][0].tensor
    stored, outside = rename(pair_scales(read_headers(path)), base=architecture.base, embedding=embedding)
    found = match(entries, stored, unused=architecture.unused_tensors)
    if found.problems:
        raise WeightsError(found.problems)
    notes = [*converted.notes, *found.notes]
    if outside:
        notes.append(f"{len(outside)} tensors outside the language model are left out, {outside[0]} the first of them")
    return Folder(path, converted.data, fields, stored, found, notes)


def _check_quantization(path: Path, config: Mapping[str, Any]) -> None:
    settings = config.get(QUANTIZATION)
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if settings is not None and method not in _READABLE[1:]:
        raise WeightsError(
            [
                Problem(
                    str(path / "config.json"),
                    f"$.{QUANTIZATION}: weights quantized by {method} are not read: supported are fp8 and mxfp4",
                )
            ]
        )
