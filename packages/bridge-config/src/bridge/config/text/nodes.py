"""The values of a text where they stand in it, and the lines and columns of its characters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Position = tuple[int, int]


@dataclass(slots=True, eq=False)
class Node:
    """A value where it stands in a text. `start` and `end` count characters; a block collection ends with its last
    value, and a block scalar with the blank lines after it.
    """

    start: int
    end: int
    value: Any = None
    """A scalar, a `dict[str, Node]` or a `list[Node]`."""
    style: str = ""
    """How it is written: empty (plain, or a block collection), a quote, `|`, `>`, or `{` (any flow collection)."""
    anchored: bool = False
    alias: Node | None = None
    """What it stands for, if it is an alias."""
    key: tuple[int, int] | None = None
    """Where its key starts and ends, if it is in a mapping."""
    size: int = 1
    """How many values it stands for, itself included."""
    depth: int = 0

    def data(self) -> Any:
        """The plain data that it stands for."""
        value = self.alias.value if self.alias else self.value
        if type(value) is dict:
            return {key: node.data() for key, node in value.items()}
        return [node.data() for node in value] if type(value) is list else value


class Places:
    """The lines and columns (from 1) of the characters of a text. Quick for places near the one asked for before."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._index = 0
        self._line = 1

    def __getitem__(self, index: int) -> Position:
        text = self._text
        low, high = min(index, self._index), max(index, self._index)
        breaks = text.count("\n", low, high)
        if returns := text.count("\r", low, high):
            breaks += returns - text.count("\r\n", low, high)
        self._line += breaks if index > self._index else -breaks
        self._index = index
        start = text.rfind("\n", 0, index) + 1
        return self._line, index - max(start, text.rfind("\r", start, index) + 1) + 1
