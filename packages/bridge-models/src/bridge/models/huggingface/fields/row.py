"""A row of a table, and the kinds of rows that all others are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.config.paths import format_path
from bridge.config.problems import describe_value
from bridge.models.huggingface.translation import INTEGER, Name, Translate, Translation, format_value


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
    """A field of the document with one value, which config.json has no field for.

    Args:
        path: The field.
        value: What it is.
        why: What is wrong with other values; ``{model_type}`` stands for the architecture.
    """

    def read(t: Translation) -> None:
        t[path] = value

    def write(t: Translation) -> None:
        if t[path] != value:
            t.refuse_other(path, why, value)

    return Row({}, (path,), read, write)


def only(name: str, value: Any, kind: str, why: str, *, default: Any = ..., also: tuple[Any, ...] = ()) -> Row:
    """A field of config.json with one value, which the document has no field for.

    Args:
        name: The field.
        value: What it is written as, if that is not its default.
        kind: Its kind.
        why: What is wrong with other values; ``{model_type}`` stands for the architecture.
        default: What transformers takes where it is left out, if that is not ``value``.
        also: Other values that mean the same.
    """
    default = value if default is ... else default

    def read(t: Translation) -> None:
        found = t[name]
        if found != value and found not in also:
            t.refuse_other(name, why, value)

    def write(t: Translation) -> None:
        if value != default:
            t[name] = value

    return Row({name: Name(kind, default, null=None in also)}, (), read, write)


def setting(path: str, value: Any, *, of_training: str = "") -> Row:
    """A field of the document that does not change what the model computes, and what to set it to.

    Args:
        path: The field.
        value: What to set it to.
        of_training: What is not said of another value when it is written, if that matters to training;
            ``{model_type}`` stands for the architecture.
    """

    def read(t: Translation) -> None:
        t[path] = value

    def write(t: Translation) -> None:
        if of_training and t[path] != value:
            t.note(f"{format_path(t.path(path))} {format_value(t[path])} is left out: {t.explain(of_training)}")

    return Row({}, (path,), read, write)


def derived(name: str, value: Callable[[Translation], Any], meaning: str) -> Row:
    """A field of config.json that follows from others; transformers saves some of those."""

    def read(t: Translation) -> None:
        if name in t and t[name] != value(t):
            t.refuse(name, f"must be {meaning}, {got(value(t))}")

    return Row({name: Name(INTEGER)}, (), read, lambda t: None)
