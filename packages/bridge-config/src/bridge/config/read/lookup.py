"""Look up names among the objects of this process, or in the shipped table of descriptions."""

from __future__ import annotations

import sys
from typing import Protocol

from bridge.config.errors import TargetError
from bridge.config.schema import registry
from bridge.config.schema.annotations import Class, Instance
from bridge.config.schema.generation import keeps_data
from bridge.config.schema.inspection import describe, is_dtype
from bridge.config.schema.registry import get_document_name
from bridge.config.schema.table import get_shipped, get_shipped_dtypes
from bridge.config.schema.target import Target


class Lookup(Protocol):
    """Finds the descriptions that names stand for."""

    def find_by_name(self, name: str, *, suggest: bool = True) -> Target:
        """Return the description of `name`; raise TargetError if documents may not use it."""
        ...

    def find_class(self, member: Instance | Class) -> Target | None:
        """Return the class that an annotation names; None if only its name is known."""
        ...

    def find_dtype(self, name: str) -> Target | None:
        """Return the dtype called `name`, with or without `torch.`; None if there is none."""
        ...

    def lookup_for_generation_settings(self, target: Target, value: object) -> Lookup | None:
        """Return the lookup for the generation settings `value` of a config `target` if they are kept as data."""
        ...


class LiveLookup:
    """Finds the objects of this process: registered, or declared by installed distributions."""

    def find_by_name(self, name: str, *, suggest: bool = True) -> Target:
        if name.startswith("torch.") and (dtype := self.find_dtype(name)) is not None:
            return dtype
        return describe(registry.resolve(name, suggest=suggest), name)

    def find_class(self, member: Instance | Class) -> Target | None:
        return describe(member.cls) if member.cls is not None else None

    def find_dtype(self, name: str) -> Target | None:
        torch = sys.modules.get("torch")
        # vars, not getattr: torch imports modules on attribute access.
        found = vars(torch).get(name.removeprefix("torch.")) if torch else None
        return describe(found) if is_dtype(type(found)) else None

    def lookup_for_generation_settings(self, target: Target, value: object) -> Lookup | None:
        return TableLookup() if keeps_data(target.obj, value) else None


class TableLookup:
    """Finds descriptions, shipped ones first: verdicts do not depend on which libraries are installed."""

    def find_by_name(self, name: str, *, suggest: bool = True) -> Target:
        if name.startswith("torch.") and (dtype := self.find_dtype(name)) is not None:
            return dtype
        if registry.is_registered(name):
            return _describe_by_own_name(registry.resolve(name), name)
        if (target := get_shipped(name)) is not None and not target.nested:
            registry.check_declared(name)
            return target
        return _describe_by_own_name(registry.resolve(name, suggest=suggest), name)

    def find_class(self, member: Instance | Class) -> Target | None:
        name = member.name if isinstance(member, Instance) else member.bound
        found = get_shipped(name) if name is not None else None
        return found or (describe(member.cls) if member.cls is not None else None)

    def find_dtype(self, name: str) -> Target | None:
        canonical = get_shipped_dtypes().get(name.removeprefix("torch."))
        return Target(canonical, "dtype") if canonical is not None else None

    def lookup_for_generation_settings(self, target: Target, value: object) -> Lookup | None:
        return None


def _describe_by_own_name(obj: object, name: str) -> Target:
    """Return the description of `obj`, which documents may call `name`, under the name that is written."""
    return describe(obj, registry.find_document_name(obj) or name)


def check_builder(name: str, target: Target, lookup: Lookup, *, suggest: bool = True) -> None:
    """Check that documents may name the builder called `name`, and that it builds configs of the class `target`.

    Raises:
        TargetError: it is unknown, no ModelBuilder, or for other configs.
    """
    accepted = registry.find_accepted_config(name)
    # Loading a declared builder defines its class, which registers it: look it up again after that.
    found = (
        get_document_name(accepted)
        if accepted
        else lookup.find_by_name(name, suggest=suggest).accepts
        or get_document_name(registry.find_accepted_config(name))
    )
    if found is None:
        raise TargetError(f"{name!r} is not a ModelBuilder")
    if found not in target.bases:
        raise TargetError(f"{name} builds {found.rpartition('.')[2]}, not {target.short_name}")
