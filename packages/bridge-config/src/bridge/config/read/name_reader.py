"""Reads names: finds the classes, functions, dtypes and enumeration members that the text of a document stands for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bridge.config.errors import TargetError, did_you_mean
from bridge.config.problems import (
    describe_value,
    make_error,
    make_mismatch_error,
    prefix_path,
)
from bridge.config.read.cache import get_caches
from bridge.config.read.fit import accepts_instance, accepts_object, describe_kind
from bridge.config.read.lookup import LiveLookup, Lookup
from bridge.config.schema.annotations import (
    Anything,
    Choice,
    Class,
    Dtype,
    Fixed,
    Function,
    Instance,
    Items,
    Mapping,
    Member,
    Plain,
    Type,
)
from bridge.config.schema.registry_state import get_generation
from bridge.config.schema.table import get_shipped_dtypes
from bridge.config.schema.target import Target
from bridge.config.schema.values import EnumMember, Named

_MAX_TEXTS = 10_000
_MAX_HINTS = 20  # suggestions per document: finding the nearest name can take 20 ms


class NameReader:
    """Reads the names in one document, and describes in messages what a place expects."""

    def __init__(self, lookup: Lookup, *, suggest: bool) -> None:
        """Create a reader.

        Args:
            lookup: finds what names stand for.
            suggest: whether messages about unknown names suggest others.
        """
        self._lookup = lookup
        self._suggest = suggest
        self._hints = _MAX_HINTS
        is_live = isinstance(lookup, LiveLookup)
        self._texts, self._classes = get_caches(get_generation()) if is_live else ({}, {})

    def resolve_class(self, name: object, type_: Type) -> Target:
        """Return the class called `name`, which must derive from one of those in `type_`."""
        target = self._resolve(name, type_)
        for member in type_:
            if accepts_instance(member, target):
                return target
        raise make_error(f"expected {self._describe_type(type_)}, but {name!r} is {describe_kind(target)}")

    def find_config_class(self, data: dict[str, Any], type_: Type) -> Target:
        """Return the config class of which the mapping `data` describes an instance."""
        if "_target_" in data:
            name = data["_target_"]
            if type(name) is str and (known := self._classes.get((id(type_), name))) is not None:
                return known
            with prefix_path("_target_"):
                target = self.resolve_class(name, type_)
                if target.kind != "config":
                    raise make_error(f"{name!r} is not a config: documents describe only dataclasses")
                self._classes[id(type_), target.name] = target
                return target
        candidates = [
            target for target in map(self._get_target, type_) if target is not None and target.kind == "config"
        ]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise make_error("missing '_target_': " + " or ".join(repr(target.name) for target in candidates))
        raise make_mismatch_error(self._describe_type(type_), data)

    def _get_target(self, member: Member) -> Target | None:
        return self._lookup.find_class(member) if isinstance(member, Instance) else None

    def _read_text(self, value: str, type_: Type) -> Any:
        texts = self._texts
        if len(texts) >= _MAX_TEXTS:
            texts.clear()
        read = texts[id(type_), value] = self._resolve_text(value, type_)
        return read

    def _resolve_text(self, value: str, type_: Type) -> Any:
        known: list[str] = []
        for member in type_:
            match member:
                case Plain("str") | Anything():
                    return value
                case Choice(values):
                    if value in values:
                        return value
                    known += [choice for choice in values if isinstance(choice, str)]
                case Dtype():
                    if (dtype := self._lookup.find_dtype(value)) is not None:
                        return Named(dtype)
                    known += [prefix + name for prefix in ("torch.", "") for name in get_shipped_dtypes()]
                case Instance(only=only) if (enum := self._lookup.find_class(member)) and enum.kind == "enum":
                    if value in (only or enum.members):
                        return EnumMember(enum, value)
                    known += only or enum.members
        if any(isinstance(member, (Function, Class)) for member in type_):
            return self._read_named(value, type_)
        raise make_mismatch_error(self._describe_type(type_), value, self._suggest_name(value, known))

    def _read_named(self, name: object, type_: Type) -> Any:
        """Read a name as the object itself, if that fits the place."""
        target = self._resolve(name, type_)
        if not any(accepts_object(target, member) for member in type_):
            raise make_error(f"expected {self._describe_type(type_)}, but {name!r} is {describe_kind(target)}")
        return Named(target)

    def _resolve(self, name: object, type_: Type) -> Target:
        """Resolve `name`. Classes that the annotation names come from code and need no registration."""
        if not isinstance(name, str):
            raise make_error(f"expected a name, got {describe_value(name)}")
        try:
            for member in type_:
                own = member.name if isinstance(member, Instance) else getattr(member, "bound", None)
                if own == name and (target := self._lookup.find_class(member)) is not None:  # type: ignore[arg-type]
                    return target
            return self._lookup.find_by_name(name, suggest=self._suggest and self._hints > 0)
        except TargetError as error:
            self._hints -= 1
            raise make_error(str(error)) from error

    def _suggest_name(self, name: str, known: Iterable[str], *, prefix: str = "") -> str:
        """Return the suggestion at the end of a message about an unknown name, see `did_you_mean`."""
        self._hints -= 1
        return did_you_mean(name, known, prefix=prefix) if self._hints >= 0 else ""

    def _describe_type(self, type_: Type) -> str:
        """Describe the expected values for an error message."""
        words = [self._describe_member(member) for member in type_ if member != Plain("null")]
        return " or ".join(dict.fromkeys(words)) or "null"

    def _describe_member(self, member: Member) -> str:
        match member:
            case Plain(kind):
                return _WORDS[kind]
            case Choice(values):
                return "one of " + ", ".join(repr(value) for value in values)
            case Instance(name, _, only):
                target = self._lookup.find_class(member)
                if target is not None and target.kind == "enum":
                    return f"one of {', '.join(only or target.members)}"
                return f"a {name.rpartition('.')[2]}"
            case _:
                return _WORDS[type(member)]


_WORDS: dict[object, str] = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "null": "null",
    Items: "a list",
    Fixed: "a list",
    Mapping: "a mapping",
    Dtype: "a dtype such as 'torch.bfloat16'",
    Function: "the name of a function",
    Class: "the name of a class",
    Anything: "a value",
}
