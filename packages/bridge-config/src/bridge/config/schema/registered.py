"""What this process registered: objects that documents may name, and the builders of configs.

`import bridge.config` needs no more of the registry than this; see `bridge.config.schema.registry`.
"""

from __future__ import annotations

import importlib
from typing import TypeVar

from bridge.config.errors import TargetError
from bridge.config.schema.names import qualified_name

T = TypeVar("T")

objects: dict[str, object] = {}
names: dict[int, tuple[object, str]] = {}
"""The names of objects, as far as they were looked for; by identity, since objects may be unhashable."""

_builders: dict[str, tuple[type, type]] = {}
_generation = 0


def generation() -> int:
    """A number that grows whenever names may have changed what they stand for."""
    return _generation


def forget_names() -> None:
    """Take note that names may have changed what they stand for."""
    global _generation
    _generation += 1
    names.clear()


def enter(obj: T, name: str) -> T:
    """Let `name` stand for `obj` in documents of this process.

    Raises:
        TargetError: the name already stands for another object.
    """
    present = objects.get(name, obj)
    # A definition that was run again (in a notebook, say) replaces the earlier one of the same name.
    if present is not obj and (qualified_name(present) is None or qualified_name(present) != qualified_name(obj)):
        raise TargetError(f"{name!r} already stands for {present!r}: register {obj!r} under another name")
    objects[name] = obj
    forget_names()
    return obj


def register_builder(cls: type, accepts: type) -> None:
    """Let documents name the builder `cls` under `_builder_`, for configs that are instances of `accepts`."""
    _builders[f"{cls.__module__}.{cls.__qualname__}"] = (cls, accepts)


def accepted_by(cls: type) -> type | None:
    """The config class that `cls` builds; None if it is no ModelBuilder."""
    known, accepted = _builders.get(qualified_name(cls) or "", (None, None))
    return accepted if known is cls else None


def accepts(name: str) -> type | None:
    """The config class that the ModelBuilder called `name` builds; None if no such builder is defined here."""
    return _builders[name][1] if name in _builders else None


def import_builder(name: str) -> type:
    """The builder class that a config *class* names. That is code, not data, so it is imported if need be.

    Raises:
        TargetError: there is no such class.
    """
    if name in _builders:
        return _builders[name][0]
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise TargetError(f"the builder {name!r} cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise TargetError(f"the builder {name!r} is {found!r}, not a class")
    return found
