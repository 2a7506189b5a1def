"""The protocol of objects that can be written to and read from documents."""

from __future__ import annotations

from typing import Any, Protocol, Self, runtime_checkable


@runtime_checkable
class Serializable(Protocol):
    """An object with a plain-data form that names its class under `_target_`."""

    def as_dict(self) -> dict[str, Any]:
        """Return the object as plain data (JSON types only)."""
        ...

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the object that `data` describes."""
        ...
