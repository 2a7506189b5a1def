"""Values with their position in a text, and lines and columns of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Position = tuple[int, int]


@dataclass(slots=True, eq=False)
class Node:
    """A value and its position in a text.

    `start` and `end` are character offsets. A block collection ends with its last value, a block scalar with the blank
    lines after it.
    """

    start: int
    end: int
    value: Any = None
    """A scalar, a `dict[str, Node]` or a `list[Node]`."""
    style: str = ""
    """Empty for a plain scalar or a block collection; otherwise a quote, `|`, `>`, or `{` (any flow collection)."""
    anchored: bool = False
    alias: Node | None = None
    """The anchored node that an alias refers to."""
    key: tuple[int, int] | None = None
    """Start and end of its key; None outside a mapping."""
    size: int = 1
    """The number of values, itself and those behind aliases included."""
    depth: int = 0

    def to_data(self) -> Any:
        """Return the plain data of the node, with aliases resolved."""
        value = self.alias.value if self.alias else self.value
        if type(value) is dict:
            return {key: node.to_data() for key, node in value.items()}
        return [node.to_data() for node in value] if type(value) is list else value


class Places:
    """Lines and columns of a text, counted from 1, by character offset. Fast for offsets near the previous one."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._index = 0
        self._line = 1

    def __getitem__(self, index: int) -> Position:
        text = self._text
        # Counting from the previous offset avoids a scan of the whole text for every problem.
        low, high = min(index, self._index), max(index, self._index)
        breaks = text.count("\n", low, high)
        if returns := text.count("\r", low, high):
            breaks += returns - text.count("\r\n", low, high)
        self._line += breaks if index > self._index else -breaks
        self._index = index
        start = text.rfind("\n", 0, index) + 1
        return self._line, index - max(start, text.rfind("\r", start, index) + 1) + 1
