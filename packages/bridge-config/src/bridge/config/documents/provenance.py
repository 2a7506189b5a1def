"""Where the values of a document came from: its text, overrides, and what moved them since."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from bridge.config.errors import Problem
from bridge.config.paths import Path, parse_path
from bridge.config.text.nodes import Node
from bridge.config.text.parse import ParsedText

if TYPE_CHECKING:
    from bridge.config.rewrite import Migration


@dataclass
class Provenance:
    """The text that a document was read from, and what was done to its values since."""

    text: ParsedText | None = None
    dropped: frozenset[Node] = frozenset()
    """The removed items of lists: those after them have another index now than in the text."""

    _origins: dict[Path, str] = field(default_factory=dict)
    """What values that were set came from: an override, or the source without a place in it."""

    _migrations: tuple[Migration, ...] = ()
    """How the data came to stand elsewhere than in the text."""

    _given_origins: dict[Path, str] = field(default_factory=dict)
    """What `_origins` was before that, by the places in the text."""

    def copy(self) -> Self:
        """One that can be changed without changing this one."""
        return replace(self, _origins=dict(self._origins))

    def note_set(self, path: Path, origin: str) -> None:
        """Note that the value at `path` was replaced by one that came from `origin`."""
        self._forget(path)
        self._origins[path] = origin

    def note_removed(self, path: Path, source: str) -> None:
        """Note that the value at `path` was removed from the document of `source`."""
        is_item = isinstance(path[-1], int)
        if is_item:
            self._drop(path, source)
        self._forget(path)
        if is_item:
            self._origins = {_shift_index(at, path): text for at, text in self._origins.items()}

    def note_migrated(self, steps: tuple[Migration, ...]) -> None:
        """Note that the data went through `steps`."""
        self._given_origins |= {self._find_text_path(at): text for at, text in self._origins.items()}
        self._migrations += steps
        self._origins = {}

    def locate(self, problems: Iterable[Problem], source: str) -> list[Problem]:
        """Problems of the document of `source` with file, line and column, in the order of the text."""
        located = [self._locate(problem, source) for problem in problems]
        return sorted(located, key=lambda problem: (problem.line or 0, problem.column or 0))

    def _locate(self, problem: Problem, source: str) -> Problem:
        path = parse_path(problem.path)
        if found := _find_origin(self._origins, path) or _find_origin(self._given_origins, self._find_text_path(path)):
            return Problem(problem.path, problem.message, found)
        nodes = self._find_nodes(path)
        if self.text is None or not nodes:
            return Problem(problem.path, problem.message, source or None)
        last = nodes[-1]
        place = self.text.places[last.key[0] if last.key else last.start]
        return Problem(problem.path, problem.message, source, *place)

    def _forget(self, path: Path) -> None:
        """Forget which overrides the values at `path` and below came from: they have been replaced."""
        self._origins = {at: text for at, text in self._origins.items() if at[: len(path)] != path}

    def _find_nodes(self, path: Path) -> list[Node]:
        """What stands in the text along a path, from the top on, as far as there is anything."""
        node = self.text.root if self.text else None
        found: list[Node] = []
        for step in (*self._find_text_path(path), None):
            if node is None:
                break
            found.append(node)
            inside = (node.alias or node).value
            if isinstance(inside, list):
                kept = [item for item in inside if item not in self.dropped] if self.dropped else inside
                node = kept[step] if isinstance(step, int) and step < len(kept) else None
            else:
                node = inside.get(step) if isinstance(inside, dict) else None
        return found

    def _drop(self, path: Path, source: str) -> None:
        """Note that the item at `path` is removed from its list. What an alias stands for stays."""
        nodes = self._find_nodes(path)
        if any(node.alias for node in nodes[:-1]):
            self._origins.setdefault(path[:-1], source)  # its items now have other indices than those in the text
        elif len(nodes) == len(path) + 1:
            self.dropped |= {nodes[-1]}

    def _find_text_path(self, path: Path) -> Path:
        """Where the value that is now at `path` stands in the text."""
        if not self._migrations:
            return path
        from bridge.config.read.decode import original_path  # loaded already, as it was migrated

        return original_path(path, self._migrations)


def _find_origin(origins: dict[Path, str], path: Path) -> str | None:
    """Where the value at `path` came from: said for it, or for what it is in."""
    return next((origins[path[:length]] for length in range(len(path), -1, -1) if path[:length] in origins), None)


def _shift_index(path: Path, gone: Path) -> Path:
    """`path` once the item at `gone` is removed from its list."""
    *above, index = gone
    depth = len(above)
    if len(path) > depth and path[:depth] == gone[:-1] and path[depth] > index:  # type: ignore[operator]  # both in a list
        return (*path[:depth], path[depth] - 1, *path[depth + 1 :])  # type: ignore[operator]
    return path
