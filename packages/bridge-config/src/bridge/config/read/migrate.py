"""Versions of a config's form in documents: what changed when, and documents of older versions brought up to date.

Plain data in, plain data out: no class is looked at, only its description.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from bridge.config.errors import ConfigError, TargetError
from bridge.config.paths import Path, parsed, shown
from bridge.config.problems import got, shortened
from bridge.config.schema.annotations import Anything, Fixed, Instance, Items, Member, Type
from bridge.config.schema.annotations import Mapping as MappingType

if TYPE_CHECKING:
    from bridge.config.schema.target import Target

VERSION_KEY = "_version_"


@dataclass(frozen=True)
class Moved:
    """In version `since`, what stood at `old` went to `new`: a rename, or a move into or out of a nested config.

    Both are paths from the config's own mapping, such as `rotary_base` and `transformer.rotary_base`.
    """

    since: int
    old: str
    new: str


@dataclass(frozen=True)
class Removed:
    """In version `since`, `field` went away. An older document may still give one of the `harmless` values."""

    since: int
    field: str
    harmless: tuple[Any, ...]
    reason: str
    """Why it went, and what to do instead: told to whoever gives another value."""


@dataclass(frozen=True)
class Changed:
    """In version `since`, values of `field` got another meaning, or its default became another.

    `values` are pairs of an old written value and the new one of the same meaning; others stay as they are. `absent`
    is the old default, written out where an older document is silent.
    """

    since: int
    field: str
    values: tuple[tuple[Any, Any], ...] = ()
    absent: Any = dataclasses.field(default_factory=lambda: MISSING)


Change = Moved | Removed | Changed


@dataclass(frozen=True)
class Schema:
    """The version of a config's form in documents, and how it came from older ones.

    A `ModelConfig` declares it as `schema: ClassVar[Schema]`; for a class of another project it is declared in the
    entry-point group `bridge.schemas`, under the class's dotted name.

    Changes of one version count together: first what it removed, then all its moves at once (so two fields can trade
    names), then what it changed, by the names that its moves led to. A config's own changes come before those of the
    configs in it.

    Raises:
        ConfigError: a version is out of range, or a change does not say what changed.
    """

    version: int = 1
    changes: tuple[Change, ...] = ()

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version < 1:
            raise ConfigError(f"a schema's version is a whole number from 1, not {self.version!r}")
        for change in self.changes:
            _check(change, self.version)

    def after(self, version: int) -> Iterator[tuple[int, list[Change]]]:
        """Each version after `version`, in order, with its changes."""
        later = sorted((change for change in self.changes if change.since > version), key=lambda one: one.since)
        for since, changes in groupby(later, lambda change: change.since):
            yield since, list(changes)

    def to_json(self) -> dict[str, Any]:
        """This schema as plain data."""
        return {"version": self.version, "changes": [_change_to_json(change) for change in self.changes]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Schema:
        """The schema that `to_json` wrote."""
        return cls(data["version"], tuple(_change_from_json(entry) for entry in data.get("changes", ())))


def _check(change: Change, version: int) -> None:
    if not 2 <= change.since <= version:
        raise ConfigError(f"{change}: since must be from 2 to the schema's version, {version}")
    for path in (change.old, change.new) if isinstance(change, Moved) else (change.field,):
        if not all(isinstance(step, str) for step in parsed(path)) or not parsed(path):
            raise ConfigError(f"{change}: {path!r} is not the path of a field")
    if isinstance(change, Moved) and change.old == change.new:
        raise ConfigError(f"{change}: nothing moves")
    if isinstance(change, Changed) and not change.values and change.absent is MISSING:
        raise ConfigError(f"{change}: give values, absent or both")


def _change_to_json(change: Change) -> dict[str, Any]:
    match change:
        case Moved(since, old, new):
            return {"since": since, "moved": old, "to": new}
        case Removed(since, name, harmless, reason):
            return {"since": since, "removed": name, "harmless": list(harmless), "reason": reason}
        case Changed(since, name, values, absent):
            entry: dict[str, Any] = {"since": since, "changed": name, "values": [list(pair) for pair in values]}
            return entry if absent is MISSING else entry | {"absent": absent}


def _change_from_json(entry: Mapping[str, Any]) -> Change:
    if "moved" in entry:
        return Moved(entry["since"], entry["moved"], entry["to"])
    if "removed" in entry:
        return Removed(entry["since"], entry["removed"], tuple(entry["harmless"]), entry["reason"])
    values = tuple((old, new) for old, new in entry["values"])
    return Changed(entry["since"], entry["changed"], values, entry.get("absent", MISSING))


@cache
def declared_schema(name: str) -> Schema | None:
    """The schema that an installed distribution declares for the class `name`, in the entry-point group
    `bridge.schemas`.

    Raises:
        TargetError: what is declared cannot be imported, or is no `Schema`.
    """
    from importlib.metadata import entry_points

    for point in entry_points(group="bridge.schemas", name=name):
        try:
            schema = point.load()
        except Exception as error:  # the import of someone else's module, or their Schema's own refusal
            raise TargetError(f"the schema of {name!r}, declared as {point.value!r}, fails: {error}") from error
        if not isinstance(schema, Schema):
            raise TargetError(f"the schema of {name!r}, declared as {point.value!r}, is not a Schema")
        return schema
    return None


@dataclass
class Migrated:
    """A document made from an older or foreign one."""

    data: Any
    """The document; the very object that was given if there was nothing to do."""

    moves: list[tuple[Path, Path]] = dataclasses.field(default_factory=list)
    """Where a value stands now, and where it stood."""

    notes: list[str] = dataclasses.field(default_factory=list)
    """What was done, a line each."""

    problems: list[tuple[Path, str]] = dataclasses.field(default_factory=list)
    """What is wrong, by its path in the document that was given."""


TargetOf = Callable[[str], "Target | None"]
"""Looks up the description of what a dotted name stands for."""


def migrated(data: Any, target_of: TargetOf) -> Migrated:
    """The document `data` with every config in it at its current version.

    A config without `_version_` is at its current version already. Of values that are in the way of a problem nothing
    stays in the result, so that reading it says nothing about them a second time.
    """
    if _is_current(data, (), target_of):
        return Migrated(data)
    work = _Migration(_copied(data), target_of)
    work.value(work.result.data, (), ())
    return work.finished()


def hint_for(target: Target, key: str) -> str:
    """What became of the field `key`, for a message that calls it unknown; empty if no change knows of it."""
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


def config_at(value: Mapping[str, Any], type_: Type, target_of: TargetOf) -> Target | None:
    """The config class that a mapping in a place of `type_` describes; None if it describes none that is known.

    It is what `_target_` names, or else the only config class that the type has.
    """
    if "_target_" in value:
        name = value["_target_"]
        own = [_named_by(member, target_of) for member in type_ if isinstance(member, Instance) and member.name == name]
        found = own or ([target_of(name)] if isinstance(name, str) else [])
    else:
        found = [_named_by(member, target_of) for member in type_ if isinstance(member, Instance)]
    configs = [target for target in found if target is not None and target.kind == "config"]
    return configs[0] if len(configs) == 1 else None


def _named_by(member: Instance, target_of: TargetOf) -> Target | None:
    """The class that an annotation names. That is code, not data: it need not be one that documents may name."""
    from bridge.config.schema.inspection import target_of as described

    return described(member) or target_of(member.name)


def inner_type(type_: Type) -> Type:
    """What a type says about the items of a list or mapping."""
    found: list[Any] = []
    for member in type_:
        match member:
            case Items(_, item):
                found += item
            case Fixed(items):
                found += [one for item in items for one in item]
            case MappingType(_, value):
                found += value
    return tuple(found)


_places: dict[int, tuple[Target, dict[str, Type]]] = {}


def _places_of(target: Target) -> dict[str, Type]:
    """The fields of a config that may hold configs, and their types."""
    if id(target) not in _places:
        found = {one.name: one.type for one in target.fields.values() if _may_hold_configs(one.type)}
        _places[id(target)] = target, found  # the target is kept, so that its id stays its own
    return _places[id(target)][1]


def _may_hold_configs(type_: Type) -> bool:
    """Whether a value of this type can be a config, or have one in it."""
    return any(isinstance(one, (Anything, Instance)) for one in type_) or any(map(_holds, type_))


def _holds(member: Member) -> bool:
    return isinstance(member, (Items, Fixed, MappingType)) and _may_hold_configs(inner_type((member,)))


def _is_current(value: Any, type_: Type, target_of: TargetOf) -> bool:
    """Whether every config in `value`, a mapping or list, is at its current version."""
    if isinstance(value, dict) and (target := config_at(value, type_, target_of)) is not None:
        version = value.get(VERSION_KEY)
        if (version is not None or VERSION_KEY in value) and not _is_version(version, target):
            return False
        for name, inner in _places_of(target).items():
            if type(item := value.get(name)) in _NESTING and item and not _is_current(item, inner, target_of):
                return False
        return True
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    nested = [item for item in items if type(item) in _NESTING]
    return not nested or all(_is_current(item, inner_type(type_), target_of) for item in nested)


_NESTING = frozenset({dict, list})


def _is_version(version: object, target: Target) -> bool:
    """Whether `version` is the current one of a config class."""
    return type(version) is int and version == (target.schema.version if target.schema else 1)


class _Migration:
    """One document on its way to the current versions; `result.data` is changed in place."""

    def __init__(self, data: Any, target_of: TargetOf) -> None:
        self.result = Migrated(data)
        self._target_of = target_of
        self._old: dict[Path, Path] = {}
        self._omitted = list(_omitted(data))

    def finished(self) -> Migrated:
        """The result, once all values were visited."""
        self.result.moves = list(self._old.items())
        for entry, path in self._omitted:
            entry["path"] = shown(path)
        return self.result

    def value(self, value: Any, type_: Type, path: Path) -> None:
        """Bring `value`, at `path`, and all configs in it to their current versions."""
        if isinstance(value, list):
            for index, item in enumerate(value):
                self.value(item, inner_type(type_), (*path, index))
        elif isinstance(value, dict) and (target := config_at(value, type_, self._target_of)) is not None:
            self._config(value, target, path)
            for name, inner in _places_of(target).items():
                self.value(value.get(name), inner, (*path, name))
        elif isinstance(value, dict):
            for key, item in value.items():
                self.value(item, inner_type(type_), (*path, key))

    def _config(self, data: dict[str, Any], target: Target, path: Path) -> None:
        if VERSION_KEY not in data:
            return
        schema, version = target.schema or Schema(), data.pop(VERSION_KEY)
        if type(version) is not int or version < 1:
            self._problem((*path, VERSION_KEY), f"expected a whole number from 1, got {shortened(version)}")
        elif version > schema.version:
            self._problem(
                (*path, VERSION_KEY),
                f"written by version {got(version)} of {target.short_name}; this installation knows up to "
                f"{schema.version}: update it",
            )
        else:
            for since, changes in schema.after(version):
                _Step(self, data, path, f"version {since} of {target.short_name}").take(changes)
            data[VERSION_KEY] = schema.version  # also where the class has none: whoever reads it says so

    def _problem(self, path: Path, message: str) -> None:
        self.result.problems.append((self.old(path), message))

    def old(self, path: Path) -> Path:
        """Where the value that is now at `path` stood in the document that was given."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._old:
                return self._old[path[:length]] + path[length:]
        return path

    def moved(self, moves: list[tuple[Path, Path]]) -> None:
        """Take note that values went, all at once, from the first path of each pair to the second."""
        origins = [(new, self.old(now)) for now, new in moves]
        for before, after in moves:
            inside = [path for path in self._old if path[: len(before)] == before]
            origins += [(after + path[len(before) :], self._old.pop(path)) for path in inside if path != before]
            self._old.pop(before, None)
        self._old |= {new: old for new, old in origins if new != old}
        self._omitted = [(entry, _followed(path, moves)) for entry, path in self._omitted]

    def is_omitted(self, path: Path) -> bool:
        """Whether the document says that it leaves out the value at `path`."""
        return any(at == path for _, at in self._omitted)


class _Step:
    """The changes of one version, made to the mapping `data` at `path`."""

    def __init__(self, work: _Migration, data: dict[str, Any], path: Path, version: str) -> None:
        self._work = work
        self._data = data
        self._path = path
        self._version = version

    def take(self, changes: list[Change]) -> None:
        """Make the changes."""
        for change in changes:
            if isinstance(change, Removed):
                self._remove(change)
        self._move([change for change in changes if isinstance(change, Moved)])
        for change in changes:
            if isinstance(change, Changed):
                self._change(change)

    def _remove(self, change: Removed) -> None:
        path = parsed(change.field)
        value = self._pop(path)
        if value is MISSING:
            return
        where = self._work.old((*self._path, *path))
        if any(_same(value, harmless) for harmless in change.harmless):
            said = f"{shown(where)}: {shortened(value)} left out, {self._version} removed it: {change.reason}"
            self._work.result.notes.append(said)
        else:
            message = f"{self._version} removed it, and {shortened(value)} cannot be dropped: {change.reason}"
            self._work.result.problems.append((where, message))

    def _move(self, changes: list[Moved]) -> None:
        taken = [(change, self._pop(parsed(change.old))) for change in changes]
        went = []
        for change, value in taken:
            now, new = (*self._path, *parsed(change.old)), (*self._path, *parsed(change.new))
            if value is MISSING:
                went.append((now, new))
                continue
            if reason := self._put(parsed(change.new), value):
                self._work.result.problems.append(
                    (self._work.old(now), f"{self._version} calls it {change.new!r}: {reason}")
                )
                continue
            went.append((now, new))
            said = f"{shown(self._work.old(now))}: now {shown(new)}, as {self._version} has it"
            self._work.result.notes.append(said)
        self._work.moved(went)

    def _change(self, change: Changed) -> None:
        path = parsed(change.field)
        here = (*self._path, *path)
        inside = _mapping_at(self._data, path[:-1])
        if inside is None:
            return
        value = inside.get(path[-1], MISSING)
        if value is MISSING:
            if change.absent is not MISSING and not self._work.is_omitted(here):
                inside[path[-1]] = _copied(change.absent)
                said = f"{shown(here)}: {change.absent!r} written out, its default before {self._version}"
                self._work.result.notes.append(said)
            return
        for old, new in change.values:
            if _same(value, old):
                inside[path[-1]] = _copied(new)
                said = f"{shown(self._work.old(here))}: {old!r} is {new!r} since {self._version}"
                self._work.result.notes.append(said)
                return

    def _pop(self, path: Path) -> Any:
        """Take out the value at `path`; MISSING if there is none."""
        inside = _mapping_at(self._data, path[:-1])
        return inside.pop(path[-1], MISSING) if inside is not None else MISSING

    def _put(self, path: Path, value: Any) -> str:
        """Put `value` at `path`, where nothing stands; the reason if that cannot be."""
        inside: Any = self._data
        for depth, key in enumerate(path[:-1], 1):
            inside = inside.setdefault(key, {})
            if not isinstance(inside, dict):
                return f"{shown((*self._path, *path[:depth]))} is not a mapping that could hold it"
        if path[-1] in inside:
            return "the document gives both: remove one"
        inside[path[-1]] = value
        return ""


def _mapping_at(data: dict[str, Any], path: Path) -> dict[Any, Any] | None:
    """The mapping at `path`; None if there is none."""
    inside: Any = data
    for key in path:
        inside = inside.get(key) if isinstance(inside, dict) else None
    return inside if isinstance(inside, dict) else None


def _omitted(data: Any) -> Iterator[tuple[dict[str, Any], Path]]:
    """The well-formed entries of a document's `_omitted_`, and the paths that they speak of."""
    entries = data.get("_omitted_") if isinstance(data, dict) else None
    for entry in entries if isinstance(entries, list) else ():
        try:
            yield entry, parsed(entry["path"])
        except (TypeError, KeyError, AttributeError, ConfigError):
            continue  # whoever reads the document says what is wrong with it


def _followed(path: Path, moves: list[tuple[Path, Path]]) -> Path:
    """Where `path` leads to after `moves`."""
    for now, new in moves:
        if path[: len(now)] == now:
            return new + path[len(now) :]
    return path


def _same(value: Any, other: Any) -> bool:
    """Whether two written values are the same: 1 is 1.0, but not true."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _copied(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _copied(value) for key, value in data.items()}
    return [_copied(value) for value in data] if isinstance(data, list) else data
