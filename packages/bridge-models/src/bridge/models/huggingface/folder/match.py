"""Hold the tensors of a folder against a weight table: each parameter has its tensors, each tensor its parameter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from bridge.config.errors import Problem, did_you_mean
from bridge.models.huggingface.folder.stored import Stored
from bridge.models.huggingface.weights.weight import Entry, Part, Repetition, Weight


@dataclass(frozen=True)
class Match:
    """How a folder stores the weights of a model."""

    weights: dict[str, tuple[Weight, tuple[Part, ...]]]
    """Parameters of the whole model by name, each with the tensors of this folder that make it up."""

    repeated: list[Repetition]
    """Tensors of the folder that must equal another one."""

    problems: list[Problem]
    notes: list[str]


def match(entries: Iterable[Entry], stored: Mapping[str, Stored], *, unused: Sequence[str]) -> Match:
    """Match a table and the tensors of a folder.

    Args:
        entries: The weights of the whole model.
        stored: The tensors of the folder.
        unused: Patterns of tensors that folders may have and models do not need.
    """
    found = Match({}, [], [], [])
    needed: set[str] = set()
    optional: set[str] = set()
    for entry in entries:
        if isinstance(entry, Repetition):
            optional.add(entry.tensor)
            if entry.tensor in stored and entry.of in stored:
                found.repeated.append(entry)
                _check_repetition(entry, stored, found)
            continue
        parts = _choose_form(entry, stored)
        found.weights[entry.name] = entry, parts
        for part in {part.tensor: part for part in parts}.values():
            needed.add(part.tensor)
            _check_tensor(part, entry, stored, found)
    found.problems.extend(_find_unknown(stored, needed | optional, unused))
    return found


_MOST_HINTS = 3


def _find_unknown(stored: Mapping[str, Stored], known: Set[str], unused: Sequence[str]) -> Iterable[Problem]:
    missing = [name for name in known if name not in stored]
    unknown = [name for name in stored if name not in known and not any(re.fullmatch(one, name) for one in unused)]
    for count, name in enumerate(unknown):
        hint = did_you_mean(name, missing) if count < _MOST_HINTS else ""  # each takes milliseconds
        yield Problem(name, f"unknown: no weight of the model is made of it{hint}")


def _choose_form(weight: Weight, stored: Mapping[str, Stored]) -> tuple[Part, ...]:
    """Return the first form whose tensors are all there; failing that, the one with the most of them."""

    def count_missing(form: tuple[Part, ...]) -> int:
        return len({part.tensor for part in form if part.tensor not in stored})

    return min(weight.forms, key=lambda form: (count_missing(form) > 0, not any(p.tensor in stored for p in form)))


def _check_tensor(part: Part, weight: Weight, stored: Mapping[str, Stored], found: Match) -> None:
    tensor = stored.get(part.tensor)
    if tensor is None:
        found.problems.append(Problem(part.tensor, f"missing: {weight.name} is made of it"))
        return
    has_more_rows = weight.per_token and tensor.shape[1:] == part.shape[1:] and tensor.shape[0] > part.shape[0]
    if has_more_rows:
        found.notes.append(
            f"{part.tensor} has {tensor.shape[0]:,} rows: those beyond vocab_size, {part.shape[0]:,}, are left out"
        )
    elif tensor.shape != part.shape:
        found.problems.append(Problem(part.tensor, f"expected the shape {list(part.shape)}, got {list(tensor.shape)}"))


def _check_repetition(entry: Repetition, stored: Mapping[str, Stored], found: Match) -> None:
    expected, shape = stored[entry.of].shape, stored[entry.tensor].shape
    if shape != expected:
        message = f"expected the shape {list(expected)} of {entry.of}, which it repeats, got {list(shape)}"
        found.problems.append(Problem(entry.tensor, message))
