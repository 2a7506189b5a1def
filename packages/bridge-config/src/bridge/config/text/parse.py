"""Parse YAML 1.2 and JSON into plain data with the position of every value.

Parsing stops as soon as a text exceeds the limits on size, depth or number of values.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from bridge.config.errors import DocumentError, Problem
from bridge.config.text.keys import has_key_flaw
from bridge.config.text.limits import MAX_BYTES, MAX_DEPTH, MAX_DIGITS, MAX_VALUES
from bridge.config.text.nodes import Node, Places
from bridge.config.text.scalars import read_json_scalar
from bridge.config.text.tree import TreeBuilder

BYTE_ORDER_MARK = "\ufeff"
_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
_JSON_TOKEN = re.compile(rf"{_STRING}|[\[\]{{}}]|[^\s\[\]{{}},:]+")
_JSON_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


@dataclass
class ParsedText:
    """Plain data and the text that it was read from."""

    data: Any
    text: str
    """The text without a byte order mark."""
    byte_order_mark: str
    kind: Literal["yaml", "json"]

    @cached_property
    def root(self) -> Node | None:
        """The tree of values in the text; None if it has none."""
        builder = TreeBuilder(self.text, None)
        (_read_yaml if self.kind == "yaml" else _read_json)(builder)
        return builder.root

    @cached_property
    def places(self) -> Places:
        """Lines and columns of the text."""
        return Places(self.text)


def parse_yaml(text: str, file: str | None = None) -> ParsedText:
    """Parse a YAML text. Aliases become copies of the anchored values.

    Raises:
        DocumentError: the text is not YAML 1.2, has duplicate keys, tags or merge keys, or exceeds a limit.
    """
    mark, text = _split_byte_order_mark(text, file)
    builder = TreeBuilder(text, file)
    _read_yaml(builder)
    parsed = ParsedText(builder.root.to_data() if builder.root else None, text, mark, "yaml")
    parsed.root = builder.root  # fills the cached property: JSON builds its tree only on demand
    return parsed


def parse_json(text: str, file: str | None = None) -> ParsedText:
    """Parse a JSON text.

    Raises:
        DocumentError: the text is not JSON, has duplicate keys, NaN or infinity, or exceeds a limit.
    """
    mark, text = _split_byte_order_mark(text, file)
    _check_count(text, file)
    try:
        data, has_flaws = _load_json(text)
    except json.JSONDecodeError as error:
        raise DocumentError([Problem("$", f"not JSON: {error.msg}", file, error.lineno, error.colno)]) from error
    if has_flaws:
        _read_json(TreeBuilder(text, file))  # raises with positions; false alarms pass
    return ParsedText(data, text, mark, "json")


def _load_json(text: str) -> tuple[Any, bool]:
    """Return the data of a JSON text, and whether the text may have flaws.

    `json.loads` is ten times faster than the tree, but has no positions, so it only detects that something is wrong.
    """
    flaws: list[object] = []

    def make_mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if has_key_flaw(made, pairs):
            flaws.append("key")
        return made

    def parse_integer(text: str) -> int:
        if len(text) <= MAX_DIGITS:
            return int(text)
        flaws.append("digits")
        return 0

    def parse_float(text: str) -> float:
        number = float(text)
        if math.isinf(number):
            flaws.append("infinity")
        return number

    try:
        data = json.loads(
            text,
            object_pairs_hook=make_mapping,
            parse_constant=flaws.append,
            parse_int=parse_integer,
            parse_float=parse_float,
        )
    except RecursionError:
        return None, True
    return data, bool(flaws) or _is_deep(data) or _may_have_surrogates(text)


def _read_yaml(builder: TreeBuilder) -> None:
    from bridge.config.text.yaml_events import read_yaml  # PyYAML takes 20 ms, JSON does not need it

    read_yaml(builder)


def _read_json(builder: TreeBuilder) -> None:
    """Read a text that `json.loads` accepted, and check the limits."""
    for token in _JSON_TOKEN.finditer(builder.text):
        text, (start, end) = token[0], token.span()
        if text in ("[", "{"):
            builder.open_collection(Node(start, end, [] if text == "[" else {}, "{"))
        elif text in ("]", "}"):
            builder.close_collection(end)
        else:
            style = '"' if text.startswith('"') else ""
            builder.add_scalar(Node(start, end, style=style), text, read_json_scalar)
    builder.finish()


def _split_byte_order_mark(text: str, file: str | None) -> tuple[str, str]:
    """Return the byte order mark of a text, or an empty string, and the text after it; check the size first."""
    if len(text) > MAX_BYTES:
        raise DocumentError([Problem("$", f"larger than {MAX_BYTES // 2**20} MiB", file)])
    mark = BYTE_ORDER_MARK if text.startswith(BYTE_ORDER_MARK) else ""
    return mark, text[len(mark) :]


def _check_count(text: str, file: str | None) -> None:
    """Refuse JSON with too many values before memory is allocated for them."""
    if text.count(",") + text.count("[") + text.count("{") < MAX_VALUES:
        return
    # Only now exclude strings, whose text may have commas and brackets: this is slow.
    bare = re.sub(rf"{_STRING}|\s+", "", text)
    if bare.count(",") + sum(bare.count(a) - bare.count(b) for a, b in (("[", "[]"), ("{", "{}"))) >= MAX_VALUES:
        raise DocumentError([Problem("$", f"more than {MAX_VALUES} values", file)])


def _is_deep(data: Any) -> bool:
    level = [data]  # level by level, since recursion may exceed Python's limit
    for _ in range(MAX_DEPTH + 1):
        inner = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list))]
        level = [value for values in inner for value in values]
    return bool(level)


def _may_have_surrogates(text: str) -> bool:
    return not (text.isascii() and "\\u" not in text) and _JSON_SURROGATE.search(text) is not None
