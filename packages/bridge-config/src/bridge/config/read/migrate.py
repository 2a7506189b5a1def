"""Migrates documents of older versions to the current ones.

It turns plain data into plain data and needs only the descriptions of classes, not the classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any

from bridge.config.errors import ConfigError
from bridge.config.migration import Migration
from bridge.config.paths import Path, format_path, parse_path
from bridge.config.problems import abbreviate, describe_value
from bridge.config.schema.annotations import Anything, Fixed, Instance, Items, Mapping, Member, Type, get_inner_type
from bridge.config.schema.inspection import TargetOf, find_config
from bridge.config.schema.target import Target
from bridge.config.schema.versions import VERSION_KEY, Change, Changed, Moved, Removed, Schema


def migrate(data: Any, target_of: TargetOf) -> Migration:
    """Return the document `data` with every config migrated to its current version.

    A config without `_version_` counts as current. Values that cannot be migrated are left out of the result, so that
    the reader does not report them a second time.
    """
    if _is_current(data, (), target_of):
        return Migration(data)
    work = _DocumentMigration(_copy(data), target_of)
    work.migrate_value(work.result.data, (), ())
    return work.finish()


def describe_change(target: Target, key: str) -> str:
    """Explain what happened to the unknown field `key`; empty if no change mentions it."""
    name, hint = key, ""
    for since, changes in target.schema.after(0) if target.schema else ():
        advice = f"or add '{VERSION_KEY}: {since - 1}' to have the document migrated"
        for change in changes:
            if isinstance(change, Moved) and change.old == name and not hint.startswith("was removed"):
                verb = "renamed" if "." not in change.new else "moved"
                hint, name = f"was {verb} to {change.new!r} in version {since}: write that, {advice}", change.new
                break
            if isinstance(change, Removed) and change.field == name:
                hint = f"was removed in version {since}: {change.reason}"
    return hint


_config_fields_cache: dict[int, tuple[Target, dict[str, Type]]] = {}


def _find_config_fields(target: Target) -> dict[str, Type]:
    """Return the fields of a config that may hold configs, and their types."""
    if id(target) not in _config_fields_cache:
        found = {one.name: one.type for one in target.fields.values() if _may_hold_configs(one.type)}
        _config_fields_cache[id(target)] = target, found  # keeps the target alive, so that its id is not reused
    return _config_fields_cache[id(target)][1]


def _may_hold_configs(type_: Type) -> bool:
    """Return whether a value of this type can be or contain a config."""
    return any(isinstance(one, (Anything, Instance)) for one in type_) or any(map(_may_contain_configs, type_))


def _may_contain_configs(member: Member) -> bool:
    return isinstance(member, (Items, Fixed, Mapping)) and _may_hold_configs(get_inner_type((member,)))


def _is_current(value: Any, type_: Type, target_of: TargetOf) -> bool:
    """Return whether every config in `value`, a mapping or list, is at its current version."""
    if isinstance(value, dict) and (target := find_config(value, type_, target_of)) is not None:
        version = value.get(VERSION_KEY)
        if (version is not None or VERSION_KEY in value) and not _is_version(version, target):
            return False
        for name, inner in _find_config_fields(target).items():
            if type(item := value.get(name)) in _NESTING and item and not _is_current(item, inner, target_of):
                return False
        return True
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    nested = [item for item in items if type(item) in _NESTING]
    return not nested or all(_is_current(item, get_inner_type(type_), target_of) for item in nested)


_NESTING = frozenset({dict, list})


def _is_version(version: object, target: Target) -> bool:
    """Return whether `version` is the current version of a config class."""
    return type(version) is int and version == (target.schema.version if target.schema else 1)


class _DocumentMigration:
    """The migration of one document; changes `result.data` in place."""

    def __init__(self, data: Any, target_of: TargetOf) -> None:
        self.result = Migration(data)
        self._target_of = target_of
        self._old: dict[Path, Path] = {}
        self._omitted = list(_find_omitted(data))

    def finish(self) -> Migration:
        """Return the result, after all values were visited."""
        self.result.moves = list(self._old.items())
        for entry, path in self._omitted:
            entry["path"] = format_path(path)
        return self.result

    def migrate_value(self, value: Any, type_: Type, path: Path) -> None:
        """Bring `value`, at `path`, and all configs in it to their current versions."""
        if isinstance(value, list):
            for index, item in enumerate(value):
                self.migrate_value(item, get_inner_type(type_), (*path, index))
        elif isinstance(value, dict) and (target := find_config(value, type_, self._target_of)) is not None:
            self._migrate_config(value, target, path)
            for name, inner in _find_config_fields(target).items():
                self.migrate_value(value.get(name), inner, (*path, name))
        elif isinstance(value, dict):
            for key, item in value.items():
                self.migrate_value(item, get_inner_type(type_), (*path, key))

    def _migrate_config(self, data: dict[str, Any], target: Target, path: Path) -> None:
        if VERSION_KEY not in data:
            return
        schema, version = target.schema or Schema(), data.pop(VERSION_KEY)
        if type(version) is not int or version < 1:
            self._add_problem((*path, VERSION_KEY), f"expected an integer >= 1, got {abbreviate(version)}")
        elif version > schema.version:
            self._add_problem(
                (*path, VERSION_KEY),
                f"written by version {describe_value(version)} of {target.short_name}; this installation knows up to "
                f"{schema.version}: update it",
            )
        else:
            for since, changes in schema.after(version):
                _Step(self, data, path, f"version {since} of {target.short_name}").apply(changes)
            data[VERSION_KEY] = schema.version  # even if the class has no versions: the reader reports that

    def _add_problem(self, path: Path, message: str) -> None:
        self.result.problems.append((self.find_origin(path), message))

    def find_origin(self, path: Path) -> Path:
        """Return where the value at `path` stood in the original document."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._old:
                return self._old[path[:length]] + path[length:]
        return path

    def record_moves(self, moves: list[tuple[Path, Path]]) -> None:
        """Record simultaneous moves, from the first path of each pair to the second."""
        origins = [(new, self.find_origin(now)) for now, new in moves]
        for before, after in moves:
            inside = [path for path in self._old if path[: len(before)] == before]
            origins += [(after + path[len(before) :], self._old.pop(path)) for path in inside if path != before]
            self._old.pop(before, None)
        self._old |= {new: old for new, old in origins if new != old}
        self._omitted = [(entry, _follow(path, moves)) for entry, path in self._omitted]

    def is_omitted(self, path: Path) -> bool:
        """Return whether `_omitted_` lists `path`."""
        return any(at == path for _, at in self._omitted)


class _Step:
    """The changes of one version, made to the mapping `data` at `path`."""

    def __init__(self, work: _DocumentMigration, data: dict[str, Any], path: Path, version: str) -> None:
        self._work = work
        self._data = data
        self._path = path
        self._version = version

    def apply(self, changes: list[Change]) -> None:
        """Apply the changes."""
        for change in changes:
            if isinstance(change, Removed):
                self._remove(change)
        self._move([change for change in changes if isinstance(change, Moved)])
        for change in changes:
            if isinstance(change, Changed):
                self._change(change)

    def _remove(self, change: Removed) -> None:
        path = parse_path(change.field)
        value = self._pop(path)
        if value is MISSING:
            return
        where = self._work.find_origin((*self._path, *path))
        if any(is_same(value, harmless) for harmless in change.harmless):
            note = f"{format_path(where)}: {abbreviate(value)} left out, {self._version} removed it: {change.reason}"
            self._work.result.notes.append(note)
        else:
            message = f"{self._version} removed it, and {abbreviate(value)} cannot be ignored: {change.reason}"
            self._work.result.problems.append((where, message))

    def _move(self, changes: list[Moved]) -> None:
        taken = [(change, self._pop(parse_path(change.old))) for change in changes]
        went = []
        for change, value in taken:
            now, new = (*self._path, *parse_path(change.old)), (*self._path, *parse_path(change.new))
            if value is MISSING:
                went.append((now, new))
                continue
            if reason := self._put(parse_path(change.new), value):
                self._work.result.problems.append(
                    (self._work.find_origin(now), f"{self._version} calls it {change.new!r}: {reason}")
                )
                continue
            went.append((now, new))
            note = f"{format_path(self._work.find_origin(now))}: now {format_path(new)}, as {self._version} has it"
            self._work.result.notes.append(note)
        self._work.record_moves(went)

    def _change(self, change: Changed) -> None:
        path = parse_path(change.field)
        here = (*self._path, *path)
        inside = _find_mapping(self._data, path[:-1])
        if inside is None:
            return
        value = inside.get(path[-1], MISSING)
        if value is MISSING:
            if change.absent is not MISSING and not self._work.is_omitted(here):
                inside[path[-1]] = _copy(change.absent)
                note = f"{format_path(here)}: {change.absent!r} written out, its default before {self._version}"
                self._work.result.notes.append(note)
            return
        for old, new in change.values:
            if is_same(value, old):
                inside[path[-1]] = _copy(new)
                note = f"{format_path(self._work.find_origin(here))}: {old!r} is {new!r} since {self._version}"
                self._work.result.notes.append(note)
                return

    def _pop(self, path: Path) -> Any:
        """Remove and return the value at `path`; MISSING if there is none."""
        inside = _find_mapping(self._data, path[:-1])
        return inside.pop(path[-1], MISSING) if inside is not None else MISSING

    def _put(self, path: Path, value: Any) -> str:
        """Put `value` at the free `path`; return the reason if that is impossible, else an empty string."""
        inside: Any = self._data
        for depth, key in enumerate(path[:-1], 1):
            inside = inside.setdefault(key, {})
            if not isinstance(inside, dict):
                return f"{format_path((*self._path, *path[:depth]))} is not a mapping"
        if path[-1] in inside:
            return "the document gives both: remove one"
        inside[path[-1]] = value
        return ""


def _find_mapping(data: dict[str, Any], path: Path) -> dict[Any, Any] | None:
    """Return the mapping at `path`; None if there is none."""
    inside: Any = data
    for key in path:
        inside = inside.get(key) if isinstance(inside, dict) else None
    return inside if isinstance(inside, dict) else None


def _find_omitted(data: Any) -> Iterator[tuple[dict[str, Any], Path]]:
    """Yield the well-formed entries of `_omitted_` with their parsed paths."""
    entries = data.get("_omitted_") if isinstance(data, dict) else None
    for entry in entries if isinstance(entries, list) else ():
        try:
            yield entry, parse_path(entry["path"])
        except (TypeError, KeyError, AttributeError, ConfigError):
            continue  # the reader reports it


def _follow(path: Path, moves: list[tuple[Path, Path]]) -> Path:
    """Return where `path` is after `moves`."""
    for now, new in moves:
        if path[: len(now)] == now:
            return new + path[len(now) :]
    return path


def is_same(one: Any, other: Any) -> bool:
    """Return whether two written values are the same: 1 equals 1.0 but not true, within lists and mappings too."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _copy(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _copy(value) for key, value in data.items()}
    return [_copy(value) for value in data] if isinstance(data, list) else data
