"""The state of the registry: objects that documents may name, and the builders of configs.

They are kept apart from `bridge.config.schema.registry` so that `import bridge.config` does not load the shipped table
and the entry points.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from bridge.config.errors import TargetError
from bridge.config.schema.names import get_qualified_name

if TYPE_CHECKING:
    from bridge.config.schema.target import Target

T = TypeVar("T")

objects: dict[str, object] = {}
names: dict[int, tuple[object, str]] = {}
"""Cache: id(object) -> (object, name). Objects may be unhashable, and holding one keeps its id unique."""

given_names: dict[type, str] = {}
"""Names of classes that were registered under another name than their qualified name."""

descriptions: dict[type, Target] = {}
"""Cache of `inspection.describe`. Descriptions hold names, so it is cleared when a class gets another name."""

builders: dict[str, tuple[type, type]] = {}
"""Qualified name of a builder -> (builder, config class that it builds)."""

_generation = 0


def get_generation() -> int:
    """Return a number that increases whenever a name may refer to another object: caches compare it."""
    return _generation


def clear_names() -> None:
    """Drop cached names, and increase the generation so that other caches are dropped too."""
    global _generation
    _generation += 1
    names.clear()


def register_object(obj: T, name: str) -> T:
    """Register `obj` under `name` for documents of this process, and return it.

    Raises:
        TargetError: The name already refers to another object.
    """
    present = objects.get(name, obj)
    # Running a definition again, as in a notebook, creates a new object: it replaces the earlier one.
    if present is not obj and (
        get_qualified_name(present) is None or get_qualified_name(present) != get_qualified_name(obj)
    ):
        raise TargetError(f"{name!r} already refers to {present!r}: register {obj!r} under another name")
    objects[name] = obj
    if isinstance(obj, type) and get_qualified_name(obj) not in objects:
        given_names.setdefault(obj, name)
        descriptions.clear()
    clear_names()
    return obj


def register_builder(cls: type, accepts: type) -> None:
    """Register the builder `cls`, so that `_builder_` may name it for configs that are instances of `accepts`."""
    builders[f"{cls.__module__}.{cls.__qualname__}"] = (cls, accepts)


def get_accepted_config(cls: type) -> type | None:
    """Return the config class that `cls` builds; None if `cls` is not a registered ModelBuilder."""
    known, accepted = builders.get(get_qualified_name(cls) or "", (None, None))
    return accepted if known is cls else None
