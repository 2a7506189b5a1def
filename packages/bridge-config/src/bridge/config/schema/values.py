"""Decoded values of a document before any object is built: names, enum members, partials and configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bridge.config.schema.target import Target


class _StandIn:
    """Base of placeholders that compare and hash like the objects they represent, for use in sets and as keys."""

    def _key(self) -> object:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return bool(self._key() == (other._key() if isinstance(other, _StandIn) else other))

    def __hash__(self) -> int:
        return hash(self._key())


@dataclass(frozen=True, eq=False)
class Named(_StandIn):
    """A reference to a function, class, dtype or registered value."""

    target: Target

    def _key(self) -> object:
        return (Named, self.target.name) if self.target.obj is None else self.target.obj


@dataclass(frozen=True, eq=False)
class EnumMember(_StandIn):
    """A member of an enumeration."""

    target: Target
    name: str

    def _key(self) -> object:
        # The member itself: an enum may have aliases, and its members may equal numbers or strings.
        enum = self.target.obj
        return enum[self.name] if enum is not None else (EnumMember, self.target.name, self.name)


@dataclass(eq=False)
class Partial:
    """A `functools.partial`. Like the object, it only equals itself."""

    function: Named
    args: list[Any]
    keywords: dict[str, Any]


@dataclass(eq=False)
class ParsedConfig(_StandIn):
    """An instance of a config class."""

    target: Target
    values: dict[str, Any]
    compared: tuple[Any, ...] | None = None
    """The values that hashable instances are compared by; empty if by identity. None: compare all values."""

    complete: bool = False
    """Whether the document gives every field or lists it as omitted."""

    composed: tuple[str, ...] = ()
    """The fields whose values may contain placeholders; all others are plain data."""

    in_order: bool = False
    """Whether the values are all arguments of the constructor, in its order."""

    def _key(self) -> object:
        if self.compared == ():
            return ParsedConfig, id(self)
        return ParsedConfig, self.target.name, self.values if self.compared is None else self.compared
