"""Track the source of each value of a document through overrides and migrations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from bridge.config.errors import Problem
from bridge.config.paths import Path, parse_path
from bridge.config.text.nodes import Node
from bridge.config.text.parse import ParsedText

if TYPE_CHECKING:
    from bridge.config.migration import Migration


@dataclass
class Provenance:
    """The text that a document was read from, and the changes to its values since."""

    text: ParsedText | None = None
    dropped: frozenset[Node] = frozenset()
    """Removed list items. The items after them have other indices in the data than in the text."""

    _origins: dict[Path, str] = field(default_factory=dict)
    """The source of values that were set: an override, or the document without a line."""

    _migrations: tuple[Migration, ...] = ()
    """Migrations that moved values away from their place in the text."""

    _given_origins: dict[Path, str] = field(default_factory=dict)
    """The origins before the migrations, by path in the text."""

    def copy(self) -> Self:
        """Return an independent copy."""
        return replace(self, _origins=dict(self._origins))

    def record_set(self, path: Path, origin: str) -> None:
        """Record that the value at `path` was replaced by one from `origin`."""
        self._forget(path)
        self._origins[path] = origin

    def record_removal(self, path: Path, source: str) -> None:
        """Record that the value at `path` was removed from the document of `source`."""
        is_item = isinstance(path[-1], int)
        if is_item:
            self._drop_item(path, source)
        self._forget(path)
        if is_item:
            self._origins = {_shift_index(at, path): text for at, text in self._origins.items()}

    def record_migration(self, steps: tuple[Migration, ...]) -> None:
        """Record that `steps` converted the data."""
        # Keyed by the path in the text, which later migrations do not change.
        self._given_origins |= {self._find_text_path(at): text for at, text in self._origins.items()}
        self._migrations += steps
        self._origins = {}

    def locate(self, problems: Iterable[Problem], source: str) -> list[Problem]:
        """Return problems with file, line and column, in text order."""
        located = [self._locate(problem, source) for problem in problems]
        return sorted(located, key=lambda problem: (problem.line or 0, problem.column or 0))

    def _locate(self, problem: Problem, source: str) -> Problem:
        """Return a problem with its override, or with file, line and column."""
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
        """Forget the origins of the values at `path` and below, which were replaced."""
        self._origins = {at: text for at, text in self._origins.items() if at[: len(path)] != path}

    def _find_nodes(self, path: Path) -> list[Node]:
        """Return the nodes of the text along a path, from the root to the last one that exists."""
        node = self.text.root if self.text else None
        found: list[Node] = []
        for step in (*self._find_text_path(path), None):  # None: also append the node of the last step
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

    def _drop_item(self, path: Path, source: str) -> None:
        """Record that the list item at `path` was removed. Behind an alias, the anchored list keeps the item."""
        nodes = self._find_nodes(path)
        if any(node.alias for node in nodes[:-1]):
            self._origins.setdefault(path[:-1], source)  # indices no longer match the text
        elif len(nodes) == len(path) + 1:
            self.dropped |= {nodes[-1]}

    def _find_text_path(self, path: Path) -> Path:
        """Return the path in the text of the value that is now at `path`."""
        if not self._migrations:
            return path
        from bridge.config.read.decode import find_original_path  # already loaded by the migration

        return find_original_path(path, self._migrations)


def _find_origin(origins: dict[Path, str], path: Path) -> str | None:
    """Return the origin of the value at `path`, or of the closest value around it; None if none is recorded."""
    return next((origins[path[:length]] for length in range(len(path), -1, -1) if path[:length] in origins), None)


def _shift_index(path: Path, gone: Path) -> Path:
    """Return `path` as it is after the list item at `gone` was removed."""
    *above, index = gone
    depth = len(above)
    if len(path) > depth and path[:depth] == gone[:-1] and path[depth] > index:  # type: ignore[operator]  # both in a list
        return (*path[:depth], path[depth] - 1, *path[depth + 1 :])  # type: ignore[operator]
    return path
