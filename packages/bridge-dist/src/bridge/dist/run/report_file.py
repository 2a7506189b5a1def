"""Reading of build reports and plans, with errors that name the path of a wrong value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from bridge.config import DocumentError, Problem
from bridge.config.documents.sources import read_file
from bridge.config.problems import describe_value

ValueT = TypeVar("ValueT", str, bool, int, float, dict[str, Any], list[Any])


@dataclass(frozen=True, kw_only=True)
class Part:
    """A mapping in a file, and its path."""

    data: Mapping[str, Any]
    source: str
    path: str = "$"

    def require(self, key: str, kind: type[ValueT]) -> ValueT:
        """Return a required value.

        Raises:
            DocumentError: It is missing or has another type.
        """
        value = self.get(key, kind)
        if value is None:
            raise self.make_error(key, "is missing: create the file again with this version of Bridge")
        return value

    def get(self, key: str, kind: type[ValueT]) -> ValueT | None:
        """Return a value, or None if it is missing.

        Raises:
            DocumentError: It has another type, or is a number too large to compute with.
        """
        value = self.data.get(key)
        if isinstance(value, int | float) and not abs(value) < _TOO_LARGE:  # also finds NaN
            raise self.make_error(key, f"expected a number below {_TOO_LARGE:.0e}, got {describe_value(value)}")
        if kind is float and type(value) is int:
            value = float(value)
        if value is None or type(value) is kind:
            return value
        raise self.make_error(key, f"expected {_TYPE_NAMES[kind]}, got {describe_value(value)}")

    def require_mapping(self, key: str) -> Part:
        """Return a nested mapping."""
        return Part(data=self.require(key, dict), source=self.source, path=f"{self.path}.{key}")

    def require_mappings(self, key: str) -> list[Part]:
        """Return the mappings of a list, which must not be empty."""
        items = self.require(key, list)
        if not items:
            raise self.make_error(key, "is empty: create the file again with this version of Bridge")
        for index, item in enumerate(items):
            if not isinstance(item, dict):
                raise self.make_error(f"{key}[{index}]", f"expected a mapping, got {describe_value(item)}")
        return [
            Part(data=item, source=self.source, path=f"{self.path}.{key}[{index}]") for index, item in enumerate(items)
        ]

    def make_error(self, key: str, message: str) -> DocumentError:
        """Return an error about a value."""
        return DocumentError([Problem(f"{self.path}.{key}", message, self.source)])


_TOO_LARGE = 1e30
_TYPE_NAMES: Mapping[type, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
}


def read_report(file: str) -> Part:
    """Read a build report or a plan.

    Raises:
        DocumentError: The file cannot be read, or is neither.
    """
    wanted = "write one with bridge build --json, or bridge plan --json"
    try:
        data = json.loads(read_file(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError([Problem("$", f"is not JSON ({error}): {wanted}", file)]) from None
    if not isinstance(data, dict) or "kind" not in data:
        raise DocumentError([Problem("$", f"has no kind, so it is neither a build report nor a plan: {wanted}", file)])
    part = Part(data=data, source=file)
    if (kind := part.require("kind", str)) not in ("build", "plan"):
        raise part.make_error("kind", f"expected a build report or a plan, got {kind!r}: {wanted}")
    return part
