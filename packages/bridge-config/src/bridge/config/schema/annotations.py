"""Type annotations as plain data, comparable and serializable without importing the classes they name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

PlainKind = Literal["bool", "int", "float", "str", "null"]
ItemsKind = Literal["list", "tuple", "set", "frozenset"]


@dataclass(frozen=True, slots=True)
class Plain:
    """A number, string, boolean or null. A float also accepts integers."""

    kind: PlainKind


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the listed values: a `Literal`."""

    values: tuple[str | int | bool | None, ...]


@dataclass(frozen=True, slots=True)
class Dtype:
    """A `torch.dtype`."""


@dataclass(frozen=True, slots=True)
class Function:
    """A callable that is not a config class."""


@dataclass(frozen=True, slots=True)
class Class:
    """A class object: any class, or a subclass of `bound` (a dotted name)."""

    bound: str | None = None
    cls: type | None = field(default=None, compare=False, repr=False)
    """The bound as a class object, if this came from a live annotation."""


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance of the class with this dotted name: an enum member, a config, or an opaque object."""

    name: str
    cls: type | None = field(default=None, compare=False, repr=False)
    """The class object, if this came from a live annotation."""

    only: tuple[str, ...] = ()
    """The enum members that a `Literal` lists, by name; empty if all members are allowed."""


@dataclass(frozen=True, slots=True)
class Items:
    """A sequence or set of any length."""

    kind: ItemsKind
    item: Type


@dataclass(frozen=True, slots=True)
class Fixed:
    """A tuple of fixed length with a type per item."""

    items: tuple[Type, ...]


@dataclass(frozen=True, slots=True)
class Mapping:
    """A dict."""

    key: Type
    value: Type


@dataclass(frozen=True, slots=True)
class Anything:
    """An annotation that does not restrict the value, such as `Any`."""


Member = Plain | Choice | Dtype | Function | Class | Instance | Items | Fixed | Mapping | Anything
Type = tuple[Member, ...]
"""A union of alternatives."""

ANYTHING: Type = (Anything(),)


def get_inner_type(type_: Type) -> Type:
    """Return the union of the item types of the lists, tuples and mappings in `type_`; empty if there are none."""
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
    "float": frozenset({float, int}),  # an integer is accepted as a float, and stays an integer
    "str": frozenset({str}),
    "null": frozenset({type(None)}),
}
"""The Python types that each kind of `Plain` accepts, compared with `type(value)`: bool is not int."""

_BARE: dict[str, Member] = {
    **{kind: Plain(kind) for kind in get_args(PlainKind)},
    "any": Anything(),
    "dtype": Dtype(),
    "function": Function(),
    "class": Class(),
}
_BARE_NAMES = {member: name for name, member in _BARE.items()}


def to_json(type_: Type) -> Any:
    """Return `type_` as plain data: a single entry, or a list for a union."""
    written = [_member_to_json(member) for member in type_]
    return written[0] if len(written) == 1 else written


def from_json(data: Any) -> Type:
    """Return the type that `to_json` encoded."""
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
