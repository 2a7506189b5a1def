"""Check the keys of mappings: unique strings of limited length."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from bridge.config.problems import describe_value
from bridge.config.text.limits import MAX_KEY
from bridge.config.text.scalars import find_flaw

DUPLICATE = "duplicate key"


def find_key_flaw(key: Any, siblings: Container[str], *, is_plain: bool) -> str:
    """Return why `key` is invalid, or an empty string.

    `siblings` are the other keys of the mapping. `is_plain`: the key has no quotes.
    """
    if not isinstance(key, str):
        return "keys must be strings: quote this one"
    if len(key) > MAX_KEY:
        return f"key longer than {MAX_KEY} characters"
    if key == "<<" and is_plain:
        return "merge keys (<<) are not part of YAML 1.2: write out the merged keys"
    return DUPLICATE if key in siblings else ""


def has_key_flaw(made: dict[str, Any], pairs: list[tuple[str, Any]]) -> bool:
    """Return whether the pairs of a JSON object, of which `made` is the dict, have a duplicate or too long key."""
    return len(made) < len(pairs) or (bool(made) and max(map(len, made)) > MAX_KEY)


def find_written_key_flaw(key: Any) -> str:
    """Return why `key` cannot be written, or an empty string."""
    if type(key) is not str:
        return f"keys must be strings, got {describe_value(key)}"
    if flaw := find_flaw(key):
        return f"a key {flaw}"
    return f"key longer than {MAX_KEY} characters" if len(key) > MAX_KEY else ""
