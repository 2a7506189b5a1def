"""One conversion under way: what is read, of which kinds it must be, what is made of it, and what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.config.errors import Problem, did_you_mean, quote_name
from bridge.config.paths import Path, format_path
from bridge.config.problems import describe_value

MAX_LAYERS = 10_000
"""So many layers a model may have: what is said of each is written out."""


def is_number(value: Any) -> bool:
    """Whether a value is a number, finite and of a size that a float can hold."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
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
INTEGER, COUNT, LAYERS, NUMBER, FLAG, TEXT, LIST, INTEGERS, TEXTS, MAPPING, ANYTHING = _KINDS


@dataclass(frozen=True)
class Name:
    """A field of config.json."""

    kind: str
    """What its value must be, one of the kinds above."""

    default: Any = None
    """What transformers takes where the field is left out. None also where null is as good as left out."""

    null: bool = False
    """Whether it may be null though that is not its default."""


class RefusedError(Exception):
    """A row cannot go on; what is wrong has been noted."""


class Translation:
    """What is read, on one side, and what is made of it on the other."""

    def __init__(self, model_type: str, given: Mapping[str, Any], names: Mapping[str, Name]) -> None:
        self.model_type = model_type
        """The architecture, as messages call it."""

        self.given = given
        """The fields that are read; those of a document by dotted path, with their defaults."""

        self.names = names
        """What is known about the fields that are read; nothing about those of a document, which was checked."""

        self.made: dict[str, Any] = {}
        """The fields of the other side."""

        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def __contains__(self, name: str) -> bool:
        """Whether a field is given, and not null."""
        return self.given.get(name) is not None

    def __getitem__(self, name: str) -> Any:
        """The value of a field, or its default.

        Raises:
            RefusedError: It is of a wrong kind.
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
        self.made[name] = value

    def refuse(self, name: str, message: str, *inside: str | int) -> RefusedError:
        """Note that the value of a field, or what is inside it, has no counterpart; returns what a row may raise."""
        self.problems.append(Problem(format_path((*self.path(name), *inside)), message))
        return RefusedError()

    def explain(self, why: str) -> str:
        """A reason that was given for every architecture with a row, as one of this architecture."""
        return why.format(model_type=self.model_type)

    def refuse_other(self, name: str, why: str, value: Any) -> RefusedError:
        """Refuse a value because there is only one that a field can have."""
        return self.refuse(name, f"{self.explain(why)}: must be {format_value(value)}")

    def path(self, name: str) -> Path:
        """The path of a field: in config.json of the top, in a document of ``transformer`` where its name says so."""
        outer, dot, inner = name.partition(".")
        return (outer, inner) if dot and not self.names else (name,)

    def note(self, message: str) -> None:
        """Say something that the user should know."""
        self.notes.append(message)


def format_value(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items())
    return value if isinstance(value, str) else describe_value(value)


def unknown_choice(t: Translation, name: str, value: str, known: Iterable[str], *inside: str) -> RefusedError:
    """Refuse a value that is not among the known ones."""
    message = f"unknown value {quoted(value)}{nearest(value, known)}; expected one of {', '.join(known)}"
    return t.refuse(name, message, *inside)


Translate = Callable[[Translation], None]


def run_steps(t: Translation, steps: Iterable[Translate]) -> None:
    """Take each step; one that cannot go on does not keep the others from it."""
    for step in steps:
        try:
            step(t)
        except RefusedError:
            continue
        except ArithmeticError:  # a division by nothing, or a result that no float can hold
            t.problems.append(Problem("$", "a size is zero or too large to compute with"))
