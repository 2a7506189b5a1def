"""The state of one conversion: input fields, their kinds, output fields, problems and notes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.config.errors import Problem, did_you_mean, quote_name
from bridge.config.paths import Path, format_path
from bridge.config.problems import describe_value

MAX_LAYERS = 10_000
"""Upper bound on layers: per-layer lists are written out, so a bad file must not exhaust memory."""


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number that fits into a float."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "an integer": lambda value: type(value) is int,
    "an integer >= 1": lambda value: type(value) is int and value >= 1,
    f"an integer from 1 to {MAX_LAYERS:,}": lambda value: type(value) is int and 1 <= value <= MAX_LAYERS,
    "a number": is_number,
    "true or false": lambda value: type(value) is bool,
    "a string": lambda value: isinstance(value, str),
    "a list": lambda value: isinstance(value, list),
    "a list of integers": lambda value: isinstance(value, list) and all(type(item) is int for item in value),
    "a list of strings": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    "a mapping": lambda value: isinstance(value, dict),
    "anything": lambda value: True,
}
# The keys in the same order: each name is also the text of messages.
INTEGER, COUNT, LAYERS, NUMBER, FLAG, TEXT, LIST, INTEGERS, TEXTS, MAPPING, ANYTHING = _KINDS


@dataclass(frozen=True)
class Name:
    """A field of config.json."""

    kind: str
    """The kind of its value, a key of ``_KINDS``."""

    default: Any = None
    """The default of transformers; None also where null means the same as a missing field."""

    null: bool = False
    """Whether it may be null even though that is not its default."""


class RefusedError(Exception):
    """Raised when a row cannot continue; its problem has been recorded."""


class Translation:
    """The input fields of a conversion, and the fields, problems and notes that it produces."""

    def __init__(self, model_type: str, given: Mapping[str, Any], names: Mapping[str, Name]) -> None:
        self.model_type = model_type
        """The architecture, for messages."""

        self.given = given
        """The input fields; those of a document by dotted path, with their defaults."""

        self.names = names
        """Kinds and defaults of the input fields; empty for a document, which has been checked already."""

        self.output: dict[str, Any] = {}
        """The output fields."""

        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def __contains__(self, name: str) -> bool:
        """Return whether a field is set and not null."""
        return self.given.get(name) is not None

    def __getitem__(self, name: str) -> Any:
        """Return the value of a field, or its default.

        Raises:
            RefusedError: The value is of the wrong kind.
        """
        known = self.names.get(name)
        if known is None:
            return self.given.get(name)
        if name not in self.given:
            return known.default
        value = self.given[name]
        if value is None and (known.null or known.default is None):
            return None
        if not _KINDS[known.kind](value):
            raise self.refuse(name, f"expected {known.kind}, got {describe_value(value)}")
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        self.output[name] = value

    def refuse(self, name: str, message: str, *inside: str | int) -> RefusedError:
        """Record a problem of a field, or of a value inside it; return an error that the row may raise."""
        self.problems.append(Problem(format_path((*self.path(name), *inside)), message))
        return RefusedError()

    def explain(self, why: str) -> str:
        """Return a reason with ``{model_type}`` filled in."""
        return why.format(model_type=self.model_type)

    def refuse_value(self, name: str, why: str, value: Any) -> RefusedError:
        """Refuse a value where only one is possible."""
        return self.refuse(name, f"{self.explain(why)}: must be {format_value(value)}")

    def path(self, name: str) -> Path:
        """Return the path of a field: top-level in config.json, possibly inside ``transformer`` in a document."""
        outer, dot, inner = name.partition(".")
        return (outer, inner) if dot and not self.names else (name,)

    def note(self, message: str) -> None:
        """Record a note for the user."""
        self.notes.append(message)


def format_value(value: Any) -> str:
    """Format a value for a message."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items())
    return value if isinstance(value, str) else describe_value(value)  # strings without quotes


def refuse_choice(t: Translation, name: str, value: str, known: Iterable[str], *inside: str) -> RefusedError:
    """Refuse a value that is not one of the known ones."""
    message = f"unknown value {quote_name(value)}{did_you_mean(value, known)}; expected one of {', '.join(known)}"
    return t.refuse(name, message, *inside)


Translate = Callable[[Translation], None]


def run_steps(t: Translation, steps: Iterable[Translate]) -> None:
    """Run each step; an error in one does not stop the others."""
    for step in steps:
        try:
            step(t)
        except RefusedError:
            continue
        except ArithmeticError:  # a division by zero, or a result too large for a float
            t.problems.append(Problem("$", "a size is zero or too large to compute with"))
