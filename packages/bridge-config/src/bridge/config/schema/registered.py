"""What this process registered: objects that documents may name, and the builders of configs.

`import bridge.config` needs no more of the registry than this; see `bridge.config.schema.registry`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from bridge.config.errors import TargetError
from bridge.config.schema.names import qualified_name

if TYPE_CHECKING:
    from bridge.config.schema.target import Target

T = TypeVar("T")

objects: dict[str, object] = {}
names: dict[int, tuple[object, str]] = {}
"""The names of objects, as far as they were looked for; by identity, since objects may be unhashable."""

given_names: dict[type, str] = {}
"""What classes were registered as, where that is not their own name."""

descriptions: dict[type, Target] = {}
"""Classes as `describe` found them; they hold names, and go when a class gets another one."""

builders: dict[str, tuple[type, type]] = {}
"""Builders and the configs that they build, by the builders' own names."""

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
        raise TargetError(f"{name!r} already refers to {present!r}: register {obj!r} under another name")
    objects[name] = obj
    if isinstance(obj, type) and qualified_name(obj) not in objects:
        given_names.setdefault(obj, name)
        descriptions.clear()
    forget_names()
    return obj


def register_builder(cls: type, accepts: type) -> None:
    """Let documents name the builder `cls` under `_builder_`, for configs that are instances of `accepts`."""
    builders[f"{cls.__module__}.{cls.__qualname__}"] = (cls, accepts)


def accepted_by(cls: type) -> type | None:
    """The config class that `cls` builds; None if it is no ModelBuilder."""
    known, accepted = builders.get(qualified_name(cls) or "", (None, None))
    return accepted if known is cls else None
