"""Encodes the defaults of fields, on demand."""

from __future__ import annotations

from typing import Any

from bridge.config.schema.target import Target
from bridge.config.write.encode import encode_value


def encode_default(target: Target, name: str) -> Any:
    """Return the written form of a field's default; MISSING if it has no default, or none that can be written."""
    field = target.fields[name]
    if field.make_default is None:
        return field.default
    if name not in target.defaults:
        target.defaults[name] = encode_value(field.make_default(), field.type)
    return target.defaults[name]
