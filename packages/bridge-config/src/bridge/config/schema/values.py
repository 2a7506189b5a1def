"""What a document says, as data: names, members of enumerations, partials and configs, of which nothing is made yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bridge.config.schema.target import Target


class _StandIn:
    """Equal, and fit for a set or a key, as far as what it stands for is."""

    def _key(self) -> object:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return bool(self._key() == (other._key() if isinstance(other, _StandIn) else other))

    def __hash__(self) -> int:
        return hash(self._key())


@dataclass(frozen=True, eq=False)
class Named(_StandIn):
    """A function, class, dtype or registered value itself."""

    target: Target

    def _key(self) -> object:
        return (Named, self.target.name) if self.target.obj is None else self.target.obj


@dataclass(frozen=True, eq=False)
class EnumMember(_StandIn):
    """A member of an enumeration."""

    target: Target
    name: str

    def _key(self) -> object:
        enum = self.target.obj  # which may hold one member under two names, or members that are numbers or text
        return enum[self.name] if enum is not None else (EnumMember, self.target.name, self.name)


@dataclass(eq=False)
class Partial:
    """A `functools.partial`, which equals itself alone."""

    function: Named
    args: list[Any]
    keywords: dict[str, Any]


@dataclass(eq=False)
class Made(_StandIn):
    """An instance of a config class."""

    target: Target
    values: dict[str, Any]
    compared: tuple[Any, ...] | None = None
    """The values that instances are compared by, if they have a hash; none of them where each equals itself alone."""

    complete: bool = False
    """Whether the document gives every field, or says that it leaves it out."""

    composed: tuple[str, ...] = ()
    """The fields whose values may not be what they stand for; all others are plain."""

    def _key(self) -> object:
        if self.compared == ():
            return Made, id(self)
        return Made, self.target.name, self.values if self.compared is None else self.compared
