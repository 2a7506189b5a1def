"""Tables of what the fields of a config.json are in a document, each said once for both directions.

An architecture is a tuple of rows. A row names fields of config.json and fields of the document, and has a function for
each direction; the functions below make the usual rows. What no row takes is refused by name, in either direction, so
that nothing is lost in silence. Nothing here imports torch, megatron or transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from bridge.config.errors import Problem, nearest, quoted
from bridge.config.paths import Path, shown
from bridge.config.refusal import got
from bridge.models.huggingface.fields import HARMLESS, MARKERS

GPT = "bridge.models.gpt.GPTModelConfig"
TRANSFORMER = "megatron.core.transformer.transformer_config.TransformerConfig"

FULL_ATTENTION = "full_attention"
"""What ``layer_types`` calls a layer without a window."""

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
    "an integer of at least 1": lambda value: type(value) is int and value >= 1,
    f"an integer from 1 to {MAX_LAYERS:,}": lambda value: type(value) is int and 1 <= value <= MAX_LAYERS,
    "a number": is_number,
    "true or false": lambda value: type(value) is bool,
    "text": lambda value: isinstance(value, str),
    "a list": lambda value: isinstance(value, list),
    "a list of integers": lambda value: isinstance(value, list) and all(type(item) is int for item in value),
    "a list of text": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
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

    def __init__(self, given: Mapping[str, Any], names: Mapping[str, Name]) -> None:
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
            raise self.refuse(name, f"expected {known.kind}, got {got(value)}")
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        self.made[name] = value

    def refuse(self, name: str, message: str, *inside: str | int) -> RefusedError:
        """Note that the value of a field, or what is inside it, has no counterpart; returns what a row may raise."""
        self.problems.append(Problem(shown((*self.path(name), *inside)), message))
        return RefusedError()

    def path(self, name: str) -> Path:
        """The path of a field: in config.json of the top, in a document of ``transformer`` where its name says so."""
        outer, dot, inner = name.partition(".")
        return (outer, inner) if dot and not self.names else (name,)

    def note(self, message: str) -> None:
        """Say something that the user should know."""
        self.notes.append(message)


Translate = Callable[[Translation], None]


@dataclass(frozen=True)
class Row:
    """Some fields of config.json, some of the document, and how to come from the ones to the others."""

    names: Mapping[str, Name]
    fields: tuple[str, ...]
    read: Translate
    """From config.json to the document."""

    write: Translate
    """From the document to config.json."""


def same(name: str, path: str, kind: str, default: Any = None, *, null: bool = False) -> Row:
    """A field that both sides have; null is as good as left out."""

    def read(t: Translation) -> None:
        if (value := t[name]) is not None:
            t[path] = value

    def write(t: Translation) -> None:
        if (value := t[path]) is not None:
            t[name] = value

    return Row({name: Name(kind, default, null)}, (path,), read, write)


def always(path: str, value: Any, why: str) -> Row:
    """A field of the document with one value, which config.json has no field for."""

    def read(t: Translation) -> None:
        t[path] = value

    def write(t: Translation) -> None:
        if t[path] != value:
            t.refuse(path, f"{why}: it can only be {said(value)}")

    return Row({}, (path,), read, write)


def only(name: str, value: Any, kind: str, why: str, *, default: Any = ..., also: tuple[Any, ...] = ()) -> Row:
    """A field of config.json with one value, which the document has no field for.

    Args:
        name: The field.
        value: What it is written as, if that is not its default.
        kind: Its kind.
        why: What is wrong with other values.
        default: What transformers takes where it is left out, if that is not ``value``.
        also: Other values that mean the same.
    """
    default = value if default is ... else default

    def read(t: Translation) -> None:
        found = t[name]
        if found != value and found not in also:
            t.refuse(name, f"{why}: it can only be {said(value)}")

    def write(t: Translation) -> None:
        if value != default:
            t[name] = value

    return Row({name: Name(kind, default, null=None in also)}, (), read, write)


def setting(path: str, value: Any, *, of_training: str = "") -> Row:
    """A field of the document that does not change what the model computes, and what to set it to.

    Args:
        path: The field.
        value: What to set it to.
        of_training: What is not said of another value when it is written, if that matters to training.
    """

    def read(t: Translation) -> None:
        t[path] = value

    def write(t: Translation) -> None:
        if of_training and t[path] != value:
            t.note(f"{shown(t.path(path))} {said(t[path])} is left out: {of_training}")

    return Row({}, (path,), read, write)


def said(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {said(item)}" for key, item in value.items())
    return value if isinstance(value, str) else got(value)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What one ``model_type`` of transformers is to Bridge."""

    model_type: str
    causal: str
    """The class of transformers that has the output layer."""

    target: str
    """The config class of the document."""

    transformers: tuple[str, ...] = (TRANSFORMER,)
    """The config classes that the transformer of the document may have."""

    rows: tuple[Row, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of fields of config.json."""

    ignored: Set[str] = frozenset()
    """Fields of config.json that mean nothing to the model, beside those of all architectures."""

    @property
    def names(self) -> dict[str, Name]:
        """All fields of config.json that rows read."""
        return {name: known for row in self.rows for name, known in row.names.items()}

    @property
    def fields(self) -> set[str]:
        """All fields of the document that rows read."""
        return {path for row in self.rows for path in row.fields}


def translated(t: Translation, steps: Iterable[Translate]) -> None:
    """Take each step; one that cannot go on does not keep the others from it."""
    for step in steps:
        try:
            step(t)
        except RefusedError:
            continue
        except ArithmeticError:  # a division by nothing, or a result that no float can hold
            t.problems.append(Problem("$", "its numbers are of no model: one is 0 where none may be, or far too large"))


def refuse_unknown(t: Translation, name: str, known: Iterable[str]) -> None:
    """Refuse a field of config.json that no row takes; one that says nothing of the model is left out with a note."""
    if why := _says_nothing(name, t.given[name]):
        t.note(f"{shown((name,))} is left out: {why}")
    else:
        free = [other for other in known if other not in t.given]  # a second name of a given field is no way out
        t.refuse(name, f"unknown to Bridge: remove it if the model is the same without it{nearest(name, free)}")


def _says_nothing(name: str, value: Any) -> str | None:
    """Why an unknown field says nothing of the model; None if it may."""
    if any(fnmatchcase(name, pattern) for pattern in MARKERS):
        return "another program's, which transformers does not read"
    if value is None or value is False:
        return "off, and unknown to Bridge"
    if value in ("", [], {}):
        return "empty, and unknown to Bridge"
    if any(value == harmless and type(value) is not bool for harmless in HARMLESS.get(name, ())):
        return f"{got(value)} changes nothing"
    if name == "layer_types" and isinstance(value, list) and all(kind == FULL_ATTENTION for kind in value):
        return "all layers of this architecture have full attention"
    return None


def unknown_choice(t: Translation, name: str, value: str, known: Iterable[str], *inside: str) -> RefusedError:
    """Refuse a value that is not among the known ones."""
    return t.refuse(name, f"{quoted(value)} is not known{nearest(value, known)}; known are {', '.join(known)}", *inside)
