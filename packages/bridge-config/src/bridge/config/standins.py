"""What stands for objects where a document is read without making any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bridge.config.tables import Target


@dataclass(frozen=True)
class Named:
    """A function, class, dtype or registered value itself."""

    target: Target


@dataclass(frozen=True)
class EnumMember:
    """A member of an enumeration."""

    target: Target
    name: str


@dataclass(frozen=True)
class Partial:
    """A `functools.partial`."""

    function: Named
    args: list[Any]
    keywords: dict[str, Any]


@dataclass(frozen=True)
class Made:
    """An instance of a config class."""

    target: Target
    values: dict[str, Any]
