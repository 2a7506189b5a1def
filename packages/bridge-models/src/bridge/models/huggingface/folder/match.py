"""Hold the tensors of a folder against a weight table: each parameter has its tensors, each tensor its parameter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from bridge.config.errors import Problem, did_you_mean
from bridge.models.huggingface.folder.headers import format_tensor
from bridge.models.huggingface.folder.stored import Format, Stored, make_problem
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


def name_tensors(entry: Entry) -> set[str]:
    """Return the tensors that an entry of a table may be made of."""
    if isinstance(entry, Repetition):
        return {entry.tensor}
    return {part.tensor for form in entry.forms for part in form}


def match(entries: Iterable[Entry], stored: Mapping[str, Stored], *, unused: Sequence[str]) -> Match:
    """Match a table and the tensors of a folder.

    Args:
        entries: The weights of the whole model.
        stored: The tensors of the folder.
        unused: Patterns of tensors that folders may have and models do not need.
    """
    found = Match({}, [], [], [])
    missing: dict[str, Weight] = {}
    known: set[str] = set()
    for entry in entries:
        if isinstance(entry, Repetition):
            known.add(entry.tensor)
            if entry.tensor in stored and entry.of in stored:
                found.repeated.append(entry)
                _check_repetition(entry, stored, found)
            continue
        parts = _choose_form(entry, stored)
        found.weights[entry.name] = entry, parts
        for part in parts:
            if part.tensor in known:
                continue
            known.add(part.tensor)
            if (tensor := stored.get(part.tensor)) is None:
                missing[part.tensor] = entry
            else:
                _check_tensor(part, entry, tensor, found)
    if not known & stored.keys():
        found.problems.append(_explain_stranger(missing, stored))
        return found
    found.problems.extend(Problem(name, f"missing: {weight.name} is made of it") for name, weight in missing.items())
    found.problems.extend(_find_unknown(stored, known, missing, unused))
    return found


def _explain_stranger(missing: Mapping[str, Weight], stored: Mapping[str, Stored]) -> Problem:
    expected = next(iter(missing))
    message = "missing, as are all weights of the model that config.json describes"
    if stored:
        first = next(iter(stored.values())).values
        return Problem(expected, f"{message}; instead the folder has {format_tensor(first.name)}", str(first.file))
    return Problem(expected, f"{message}: the folder has no tensors")


_MOST_HINTS = 3
_MOST_CANDIDATES = 1000  # a comparison takes 20 us; where more are missing, they are not renamed


def _find_unknown(
    stored: Mapping[str, Stored], known: Set[str], missing: Mapping[str, Weight], unused: Sequence[str]
) -> Iterable[Problem]:
    unknown = [name for name in stored if name not in known and not any(re.fullmatch(one, name) for one in unused)]
    for count, name in enumerate(unknown):
        hint = did_you_mean(name, missing) if count < _MOST_HINTS and len(missing) <= _MOST_CANDIDATES else ""
        yield make_problem(stored[name], f"unknown: no weight of the model is made of it{hint}")


def _choose_form(weight: Weight, stored: Mapping[str, Stored]) -> tuple[Part, ...]:
    """Return the first form whose tensors are all there; failing that, one that has some of them."""
    for has in (all, any):
        for form in weight.forms:
            if has(part.tensor in stored for part in form):
                return form
    return weight.forms[0]


def _check_tensor(part: Part, weight: Weight, tensor: Stored, found: Match) -> None:
    has_more_rows = weight.per_token and tensor.shape[1:] == part.shape[1:] and tensor.shape[0] > part.shape[0]
    if tensor.problem is not None:
        found.problems.append(make_problem(tensor, tensor.problem))
    elif tensor.format is Format.MXFP4 and not part.transposed:
        found.problems.append(make_problem(tensor, "is stored as MXFP4, which is read for gpt-oss only"))
    elif has_more_rows:
        rows = f"{tensor.shape[0]:,} rows: those beyond vocab_size, {part.shape[0]:,}, are left out"
        found.notes.append(f"{format_tensor(tensor.values.name)} has {rows}")
    elif tensor.shape != part.shape:
        message = f"expected the shape {list(part.shape)}, got {list(tensor.shape)}"
        found.problems.append(make_problem(tensor, message))


def _check_repetition(entry: Repetition, stored: Mapping[str, Stored], found: Match) -> None:
    tensor, expected = stored[entry.tensor], stored[entry.of].shape
    if tensor.problem is not None:
        found.problems.append(make_problem(tensor, tensor.problem))
    elif tensor.shape != expected:
        message = f"expected the shape {list(expected)} of {entry.of}, which it repeats, got {list(tensor.shape)}"
        found.problems.append(make_problem(tensor, message))
