"""A row of a table, and the basic kinds of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.config.paths import format_path
from bridge.config.problems import describe_value
from bridge.models.huggingface.translation import INTEGER, Name, Translate, Translation, format_value


@dataclass(frozen=True)
class Row:
    """Some fields of config.json, some of the document, and a function for each direction."""

    names: Mapping[str, Name]
    fields: tuple[str, ...]
    read: Translate
    """From config.json to the document."""

    write: Translate
    """From the document to config.json."""


def same(name: str, path: str, kind: str, default: Any = None, *, null: bool = False) -> Row:
    """Return the row of a field that both sides have; null means the same as a missing field."""

    def read(t: Translation) -> None:
        if (value := t[name]) is not None:
            t[path] = value

    def write(t: Translation) -> None:
        if (value := t[path]) is not None:
            t[name] = value

    return Row({name: Name(kind, default, null)}, (path,), read, write)


def always(path: str, value: Any, why: str) -> Row:
    """Return the row of a document field with a fixed value, for which config.json has no field.

    Args:
        path: The field.
        value: Its only value.
        why: Why other values are refused; ``{model_type}`` stands for the architecture.
    """

    def read(t: Translation) -> None:
        t[path] = value

    def write(t: Translation) -> None:
        if t[path] != value:
            t.refuse_value(path, why, value)

    return Row({}, (path,), read, write)


def only(name: str, value: Any, kind: str, why: str, *, default: Any = ..., also: tuple[Any, ...] = ()) -> Row:
    """Return the row of a config.json field with a fixed value, for which the document has no field.

    Args:
        name: The field.
        value: Its only value, written if it is not the default.
        kind: Its kind.
        why: Why other values are refused; ``{model_type}`` stands for the architecture.
        default: Its default in transformers, if that is not ``value``.
        also: Other accepted values with the same meaning.
    """
    default = value if default is ... else default

    def read(t: Translation) -> None:
        given = t[name]
        if given != value and given not in also:
            t.refuse_value(name, why, value)

    def write(t: Translation) -> None:
        if value != default:
            t[name] = value

    return Row({name: Name(kind, default, null=None in also)}, (), read, write)


def setting(path: str, value: Any, *, of_training: str = "") -> Row:
    """Return the row of a document field that does not change what the model computes.

    Args:
        path: The field.
        value: The value to set when reading.
        of_training: Why another value is left out when writing, if that matters to training; ``{model_type}`` stands
            for the architecture.
    """

    def read(t: Translation) -> None:
        t[path] = value

    def write(t: Translation) -> None:
        if of_training and t[path] != value:
            t.note(f"{format_path(t.path(path))} {format_value(t[path])} is left out: {t.explain(of_training)}")

    return Row({}, (path,), read, write)


def derived(name: str, value: Callable[[Translation], Any], meaning: str) -> Row:
    """Return the row of a config.json field computed from others, which transformers may save too."""

    def read(t: Translation) -> None:
        if name in t and t[name] != value(t):
            t.refuse(name, f"must be {meaning}, {describe_value(value(t))}")

    return Row({name: Name(INTEGER)}, (), read, lambda t: None)
