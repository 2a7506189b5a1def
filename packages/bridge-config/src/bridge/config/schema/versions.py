"""Schema versions of configs and the changes of each version, as data for `read.migrate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from importlib.metadata import entry_points
from itertools import groupby
from typing import Any

from bridge.config.errors import ConfigError, TargetError
from bridge.config.paths import parse_path

VERSION_KEY = "_version_"


@dataclass(frozen=True)
class Moved:
    """Version `since` moved a value from `old` to `new`: a rename, or a move into or out of a nested config.

    Both are paths relative to the config's mapping, such as `rotary_base` and `transformer.rotary_base`.
    """

    since: int
    old: str
    new: str


@dataclass(frozen=True)
class Removed:
    """Version `since` removed `field`. An older document may still have it, with one of the `harmless` values."""

    since: int
    field: str
    harmless: tuple[Any, ...]
    reason: str
    """Why it was removed and what to do instead. Part of the error message about any other value."""


@dataclass(frozen=True)
class Changed:
    """Version `since` changed the meaning of values of `field`, or its default.

    `values` are pairs of an old encoded value and the new one with the same meaning; other values stay unchanged.
    `absent` is the old default, which migration writes into older documents that lack the field.
    """

    since: int
    field: str
    values: tuple[tuple[Any, Any], ...] = ()
    absent: Any = dataclasses.field(default_factory=lambda: MISSING)


Change = Moved | Removed | Changed


@dataclass(frozen=True)
class Schema:
    """The current schema version of a config, and the changes since older versions.

    A `ModelConfig` declares it as `schema: ClassVar[Schema]`. For a class of another project, declare it in the
    entry-point group `bridge.schemas` under the dotted name of the class.

    The changes of one version apply in this order: removals, then all moves at once (so that two fields can swap
    names), then changed values, under the new names. Changes of a config apply before those of nested configs.

    Raises:
        ConfigError: A version is out of range, or a change is empty or has an invalid path.
    """

    version: int = 1
    changes: tuple[Change, ...] = ()

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version < 1:
            raise ConfigError(f"a schema's version must be an integer >= 1, got {self.version!r}")
        for change in self.changes:
            _check_change(change, self.version)

    def after(self, version: int) -> Iterator[tuple[int, list[Change]]]:
        """Yield each version after `version`, in order, with its changes."""
        later = sorted((change for change in self.changes if change.since > version), key=lambda one: one.since)
        for since, changes in groupby(later, lambda change: change.since):
            yield since, list(changes)

    def to_json(self) -> dict[str, Any]:
        """Return this schema as plain data."""
        return {"version": self.version, "changes": [_change_to_json(change) for change in self.changes]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Schema:
        """Return the schema that `to_json` encoded."""
        return cls(data["version"], tuple(_change_from_json(entry) for entry in data.get("changes", ())))


def _check_change(change: Change, version: int) -> None:
    if not 2 <= change.since <= version:
        raise ConfigError(f"{change}: `since` must be between 2 and the schema's version, {version}")
    for path in (change.old, change.new) if isinstance(change, Moved) else (change.field,):
        if not all(isinstance(step, str) for step in parse_path(path)) or not parse_path(path):
            raise ConfigError(f"{change}: {path!r} is not the path of a field")
    if isinstance(change, Moved) and change.old == change.new:
        raise ConfigError(f"{change}: `old` and `new` are the same path")
    if isinstance(change, Changed) and not change.values and change.absent is MISSING:
        raise ConfigError(f"{change}: set `values`, `absent` or both")


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
def load_declared_schema(name: str) -> Schema | None:
    """Load the schema that a distribution declares for the class `name` in `bridge.schemas`; None if none does.

    Raises:
        TargetError: The declared object cannot be imported or is not a `Schema`.
    """
    for point in entry_points(group="bridge.schemas", name=name):
        try:
            schema = point.load()
        except Exception as error:  # any error of a foreign module, or a ConfigError of its Schema
            raise TargetError(f"the schema of {name!r}, declared as {point.value!r}, fails: {error}") from error
        if not isinstance(schema, Schema):
            raise TargetError(f"the schema of {name!r}, declared as {point.value!r}, is not a bridge.config.Schema")
        return schema
    return None
