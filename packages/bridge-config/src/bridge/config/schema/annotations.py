"""What annotations say about values, as data: the same with and without the classes that they name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

PlainKind = Literal["bool", "int", "float", "str", "null"]
ItemsKind = Literal["list", "tuple", "set", "frozenset"]


@dataclass(frozen=True, slots=True)
class Plain:
    """A number, text, a truth value or null; an integer is a fine float."""

    kind: PlainKind


@dataclass(frozen=True, slots=True)
class Choice:
    """One of these very values: a `Literal`."""

    values: tuple[str | int | bool | None, ...]


@dataclass(frozen=True, slots=True)
class Dtype:
    """A `torch.dtype`."""


@dataclass(frozen=True, slots=True)
class Function:
    """Something that can be called, and is not a config class."""


@dataclass(frozen=True, slots=True)
class Class:
    """A class itself: one derived from the class of this dotted name, or any."""

    bound: str | None = None
    cls: type | None = field(default=None, compare=False, repr=False)
    """The bound itself, where the annotation was one."""


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance of the class of this dotted name: an enumeration, a config, or something opaque."""

    name: str
    cls: type | None = field(default=None, compare=False, repr=False)
    """The class itself, where the annotation was one."""

    only: tuple[str, ...] = ()
    """Of an enumeration in a `Literal`: the names of the members that it lists; none for all of them."""


@dataclass(frozen=True, slots=True)
class Items:
    """A sequence or set of any length."""

    kind: ItemsKind
    item: Type


@dataclass(frozen=True, slots=True)
class Fixed:
    """A tuple with a type for each item."""

    items: tuple[Type, ...]


@dataclass(frozen=True, slots=True)
class Mapping:
    """A dict."""

    key: Type
    value: Type


@dataclass(frozen=True, slots=True)
class Anything:
    """An annotation that says nothing."""


Member = Plain | Choice | Dtype | Function | Class | Instance | Items | Fixed | Mapping | Anything
Type = tuple[Member, ...]
"""A union of alternatives."""

ANYTHING: Type = (Anything(),)


def inner_type(type_: Type) -> Type:
    """What a type says about the items of a list or mapping."""
    found: list[Member] = []
    for member in type_:
        match member:
            case Items(_, item):
                found += item
            case Fixed(items):
                found += [one for item in items for one in item]
            case Mapping(_, value):
                found += value
    return tuple(found)


PYTHON_TYPES: dict[PlainKind, frozenset[type]] = {
    "bool": frozenset({bool}),
    "int": frozenset({int}),
    "float": frozenset({float, int}),  # an integer is a fine number, and stays the integer it was
    "str": frozenset({str}),
    "null": frozenset({type(None)}),
}
"""The types of the values of a `Plain`."""

_BARE: dict[str, Member] = {
    **{kind: Plain(kind) for kind in get_args(PlainKind)},
    "any": Anything(),
    "dtype": Dtype(),
    "function": Function(),
    "class": Class(),
}
_BARE_NAMES = {member: name for name, member in _BARE.items()}


def to_json(type_: Type) -> Any:
    """`type_` as plain data."""
    written = [_member_to_json(member) for member in type_]
    return written[0] if len(written) == 1 else written


def from_json(data: Any) -> Type:
    """The type that `to_json` wrote."""
    return tuple(_member_from_json(entry) for entry in (data if isinstance(data, list) else [data]))


def _member_to_json(member: Member) -> Any:
    match member:
        case Choice(values):
            return {"choice": list(values)}
        case Class(str() as bound):
            return {"class": bound}
        case Instance(name, _, only):
            return {"instance": [name, *only] if only else name}
        case Items(kind, item):
            return {kind: to_json(item)}
        case Fixed(items):
            return {"fixed": [to_json(item) for item in items]}
        case Mapping(key, value):
            return {"mapping": [to_json(key), to_json(value)]}
        case _:
            return _BARE_NAMES[member]


def _member_from_json(data: Any) -> Member:
    if isinstance(data, str):
        return _BARE[data]
    [(kind, of)] = data.items()
    match kind:
        case "choice":
            return Choice(tuple(of))
        case "class":
            return Class(of)
        case "instance":
            return Instance(of) if isinstance(of, str) else Instance(of[0], only=tuple(of[1:]))
        case "fixed":
            return Fixed(tuple(from_json(item) for item in of))
        case "mapping":
            return Mapping(from_json(of[0]), from_json(of[1]))
        case _:
            return Items(kind, from_json(of))
