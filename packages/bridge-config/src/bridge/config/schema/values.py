"""What stands for objects where a document is read without making any."""

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
        is_value = self.target.kind == "value" and self.target.obj is not None
        return self.target.obj if is_value else (Named, self.target.name)


@dataclass(frozen=True, eq=False)
class EnumMember(_StandIn):
    """A member of an enumeration."""

    target: Target
    name: str

    def _key(self) -> object:
        enum = self.target.obj  # which may hold one member under two names, or members that are numbers or text
        return enum[self.name] if enum is not None else (EnumMember, self.target.name, self.name)


@dataclass(frozen=True, eq=False)
class Partial:
    """A `functools.partial`, which equals itself alone."""

    function: Named
    args: list[Any]
    keywords: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Made(_StandIn):
    """An instance of a config class."""

    target: Target
    values: dict[str, Any]
    compared: tuple[Any, ...] | None = None
    """The values that instances are compared by, if they have a hash; none of them where each equals itself alone."""

    def _key(self) -> object:
        if self.compared == ():
            return Made, id(self)
        return Made, self.target.name, self.values if self.compared is None else self.compared
