"""Build the tree of a text's values, check the limits, and collect all problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from bridge.config.errors import DocumentError, Problem, shorten
from bridge.config.paths import format_path
from bridge.config.problems import MAX_PROBLEMS
from bridge.config.text.keys import DUPLICATE, find_key_flaw
from bridge.config.text.limits import MAX_DEPTH, MAX_VALUES
from bridge.config.text.nodes import Node, Places


class TreeBuilder:
    """Builds a tree from the events of a parser, checks the limits, and collects all problems."""

    def __init__(self, text: str, file: str | None) -> None:
        self.text = text
        self.root: Node | None = None
        self._file = file
        self._places = Places(text)
        self._problems: list[Problem] = []
        self._open: list[_OpenCollection] = []
        self._anchors: dict[str, Node] = {}
        self._size = 0

    def add_scalar(self, node: Node, text: str, read: Callable[[str], Any]) -> None:
        """Add a scalar, whose value is `read(text)`. A ValueError becomes a problem."""
        self._check_bounds(node)
        try:
            node.value = read(text)
        except ValueError as error:
            self.add_problem(str(error), node.start)
        self._attach(node)

    def add_alias(self, node: Node, name: str) -> None:
        """Add an alias of the node with the anchor `name`."""
        target = self._anchors.get(name)
        if target is None:
            self.add_problem(f"undefined alias *{shorten(name)}", node.start)
        elif any(target is opened.node for opened in self._open):
            self.add_problem(f"the alias *{shorten(name)} is inside the value that it refers to", node.start)
        else:
            node.alias = target.alias or target
            # Counted as a copy: nested aliases can stand for billions of values ("billion laughs").
            node.size, node.depth = target.size, target.depth
        self._check_bounds(node)
        self._attach(node)

    def add_anchor(self, node: Node, name: str | None) -> None:
        """Set the node that `name` refers to from here on."""
        if name is not None:
            node.anchored = True
            self._anchors[name] = node

    def open_collection(self, node: Node) -> None:
        """Begin a collection."""
        self._check_bounds(node)
        self._open.append(_OpenCollection(node))

    def close_collection(self, end: int) -> None:
        """End the innermost collection. `end` is the end of its closing bracket, ignored for block collections."""
        node = self._open.pop().node
        if node.style:
            node.end = end
        self._attach(node)

    def add_problem(self, message: str, index: int, *below: str) -> None:
        """Record a problem at an offset in the text. `below` extends the path of the current value."""
        path = (*(opened.step for opened in self._open if opened.step is not None), *below)
        self._problems.append(Problem(format_path(path), message, self._file, *self._places[index]))
        if len(self._problems) == MAX_PROBLEMS:
            self.fail(f"stopped after {MAX_PROBLEMS} problems", index)

    def fail(self, message: str, index: int | None) -> NoReturn:
        """Raise all problems recorded so far, and one about the whole document."""
        place = self._places[index] if index is not None else (None, None)
        raise DocumentError([*self._problems, Problem("$", message, self._file, *place)])

    def finish(self) -> None:
        """Raise the recorded problems, if any."""
        if self._problems:
            raise DocumentError(self._problems)

    def _attach(self, node: Node) -> None:
        """Attach a complete value to the innermost open collection."""
        if not self._open:
            self.root = node
            return
        opened = self._open[-1]
        if opened.is_list:
            opened.node.value.append(node)
        elif opened.wants_key:
            opened.wants_key = False
            opened.key = node.start, node.end
            opened.step = self._read_key(node, opened.node.value)
            return
        else:
            node.key = opened.key
            if opened.step is not None:
                opened.node.value[opened.step] = node
            opened.wants_key, opened.step = True, None
        opened.add(node)

    def _read_key(self, node: Node, siblings: dict[str, Node]) -> str | None:
        key = node.alias.value if node.alias else node.value
        if flaw := find_key_flaw(key, siblings, is_plain=not node.style):
            self.add_problem(flaw, node.start, *([key] if flaw == DUPLICATE else []))
            return None
        return str(key)

    def _check_bounds(self, node: Node) -> None:
        if not (self._open and self._open[-1].wants_key):  # keys do not count as values
            self._size += node.size
        if self._size > MAX_VALUES:
            self.fail(f"more than {MAX_VALUES} values", node.start)
        if len(self._open) + node.depth > MAX_DEPTH:
            self.fail(f"nested more than {MAX_DEPTH} deep", node.start)


class _OpenCollection:
    """A collection whose end has not been read."""

    __slots__ = ("is_list", "key", "node", "step", "wants_key")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.is_list = isinstance(node.value, list)
        self.wants_key = not self.is_list
        self.key: tuple[int, int] | None = None  # span of the last key
        self.step: str | int | None = 0 if self.is_list else None  # path step of the next value

    def add(self, node: Node) -> None:
        holder = self.node
        if self.is_list:
            self.step = len(holder.value)
        holder.end = node.end
        holder.size += node.size
        holder.depth = max(holder.depth, node.depth + 1)
