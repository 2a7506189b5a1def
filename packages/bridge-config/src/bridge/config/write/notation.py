"""Rules of notation: which values are written as they are, and which names and lists need an explicit `_target_`."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import Any

from bridge.config.schema.annotations import (
    ANYTHING,
    Anything,
    Choice,
    Class,
    Dtype,
    Fixed,
    Function,
    Instance,
    Items,
    Member,
    Plain,
    Type,
)
from bridge.config.schema.inspection import describe_annotated
from bridge.config.schema.target import Target

PLAIN = frozenset({str, int, bool, type(None)})
"""The types whose values are always written as they are."""


def are_plain(values: Iterable[Any]) -> bool:
    """Return whether all of `values` are written as they are."""
    return all(type(value) in PLAIN or (type(value) is float and isfinite(value)) for value in values)


def find_container_kinds(type_: Type) -> set[str]:
    """Return the kinds of container that a list in a place of this type can be read as."""
    found: set[str] = set()
    for member in type_:
        match member:
            case Anything():
                found.add("list")
            case Items(kind):
                found.add(kind)
            case Fixed():
                found.add("tuple")
    return found or {"list"}


def get_item_type(type_: Type, index: int) -> Type:
    """Return the annotated type of item `index` of a sequence."""
    found: list[Type] = []
    for member in type_:
        match member:
            case Items(_, item):
                found.append(item)
            case Fixed(items) if items:
                found.append(items[min(index, len(items) - 1)])
    return join_types(found)


def join_types(found: Iterable[Type]) -> Type:
    """Return the union of types; anything for none."""
    return tuple(dict.fromkeys(member for type_ in found for member in type_)) or ANYTHING


def encode_enum_member(name: str, enum: Target, type_: Type) -> Any:
    """Return the name alone where it can only mean a member of `enum`; else with the name of `enum`."""
    readers = [member for member in type_ if _reads_text(member)]
    if len(readers) == 1 and isinstance(readers[0], Instance) and readers[0].name == enum.name:
        return name
    return {"_target_": enum.name, "_name_": name}


def encode_named(name: str, kind: Dtype | Function, type_: Type) -> Any:
    """Return the name alone where it can only mean a dtype, function or class; else with `_call_: false`."""
    readers = [member for member in type_ if _reads_text(member)]
    if readers and (readers == [kind] or all(isinstance(member, (Function, Class)) for member in readers)):
        return name
    return {"_target_": name, "_call_": False}


def _reads_text(member: Member) -> bool:
    """Return whether text in a document can be read as a value of `member`."""
    match member:
        case Anything() | Plain("str") | Dtype() | Function() | Class():
            return True
        case Choice(values):
            return any(isinstance(value, str) for value in values)
        case Instance():
            target = describe_annotated(member)
            return target is not None and target.kind == "enum"
        case _:
            return False
