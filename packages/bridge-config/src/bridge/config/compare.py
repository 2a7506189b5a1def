"""Comparison of two documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from bridge.config.canonical import canonicalize_checked, drop_version
from bridge.config.paths import Path, format_path
from bridge.config.problems import abbreviate
from bridge.config.read.decode import Checked
from bridge.config.read.migrate import is_same
from bridge.config.text.dump import dump_flow

_NOTHING = object()


@dataclass(frozen=True)
class Difference:
    """One place where two documents differ.

    `path` is the path of the value in the current schema version. `before_path` and `after_path` are its paths in the
    two documents, which differ from `path` if a document has an older version or another format. They are None where a
    document does not give the value; then `before` or `after` is the default, if there is one.
    """

    kind: Literal["added", "removed", "changed", "moved"]
    path: str
    before: Any = None
    after: Any = None
    before_path: str | None = None
    after_path: str | None = None

    def __str__(self) -> str:
        path = self.path.removeprefix("$.")
        before, after = _format_side(self.before, self.before_path), _format_side(self.after, self.after_path)
        match self.kind:
            case "added":
                return f"+ {path}: {after}"
            case "removed":
                return f"- {path}: {before}"
            case "changed":
                text = f"~ {path}: {before} -> {after}"
            case "moved":
                text = f"> {path}: {after}"
        places = []
        if self.before_path not in (None, self.path):
            places.append(f"was {self.before_path.removeprefix('$.')}")
        if self.after_path not in (None, self.path):
            places.append(f"is {self.after_path.removeprefix('$.')} there")
        return f"{text} ({', '.join(places)})" if places else text


def find_differences(before: Checked, after: Checked) -> Iterator[Difference]:
    """Yield the differences between two checked documents, in the order of their fields.

    If both were checked with defaults, a missing field equals its default. A value that both documents have, but at
    different paths because a version moved or renamed it, has the kind "moved".
    """
    old, new = (dict(_walk_leaves(canonicalize_checked(checked))) for checked in (before, after))
    for path in dict.fromkeys((*old, *new)):
        one, other = old.get(path, _NOTHING), new.get(path, _NOTHING)
        before_path, after_path = _find_place(before, path), _find_place(after, path)
        if other is _NOTHING:
            yield Difference("removed", format_path(path), before=one, before_path=before_path)
        elif one is _NOTHING:
            yield Difference("added", format_path(path), after=other, after_path=after_path)
        elif not is_same(one, other):
            yield Difference("changed", format_path(path), one, other, before_path, after_path)
        elif before_path != after_path and before_path is not None and after_path is not None:
            yield Difference("moved", format_path(path), one, other, before_path, after_path)


def _find_place(checked: Checked, path: Path) -> str | None:
    """Return where the original document gives the value at `path`; None if it does not."""
    place = checked.present.find_origin(path)
    node: Any = checked.present.given
    for step in place:
        try:
            node = node[step]
        except (KeyError, IndexError, TypeError):
            return None
    return format_path(_strip_root(place, checked))


def _strip_root(place: Path, checked: Checked) -> Path:
    """Return `place` relative to the mapping that describes the model, which may be a section of a larger file."""
    root = checked.present.find_origin(())
    return place[len(root) :] if place[: len(root)] == root else place


def _walk_leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the values that are compared as a whole, with their paths."""
    if isinstance(value, dict) and value and "_partial_" not in value and "_args_" not in value:
        for key, item in drop_version(value).items():
            yield from _walk_leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _walk_leaves(item, (*path, index))
    else:
        yield path, value


def _format_side(value: Any, place: str | None) -> str:
    try:
        text = dump_flow(value).strip()
    except ValueError:  # it has no YAML form
        text = abbreviate(value)
    return text if place is not None else f"{text} (default)"
