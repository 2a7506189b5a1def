"""From configurations to plain data: JSON types only, nothing dropped in silence."""

from __future__ import annotations

import math
import warnings
from enum import Enum
from functools import cache, partial
from typing import Any, get_args, get_origin

from bridge.config import hints, targets
from bridge.config.errors import OmittedWarning
from bridge.config.model import ModelConfig
from bridge.config.paths import Path, shown
from bridge.config.writethrough import shared_names

Omitted = list[dict[str, str]]

_PLAIN = (str, int, bool, type(None))


class _UnwritableError(Exception):
    """A value has no written form; `path` is where in its document it would stand."""

    def __init__(self, reason: str, path: Path) -> None:
        super().__init__(reason)
        self.entry = {"path": shown(path), "reason": reason}


def encode_config(config: ModelConfig) -> dict[str, Any]:
    """The document of `config`; see `ModelConfig.as_dict`."""
    omitted: Omitted = []
    written = _object(config, (), omitted)
    document: dict[str, Any] = {"_target_": written.pop("_target_")}
    if (builder := getattr(config, "builder", None)) is not None:
        document["_builder_"] = builder
    document |= written
    if omitted:
        document["_omitted_"] = omitted
        what = "; ".join(f"{entry['path']} ({entry['reason']})" for entry in omitted)
        warnings.warn(f"{type(config).__qualname__} is written without {what}", OmittedWarning, stacklevel=3)
    return document


def _object(obj: Any, path: Path, omitted: Omitted) -> dict[str, Any]:
    """An object with slots as a mapping; what has no written form is left out and added to `omitted`."""
    written: dict[str, Any] = {"_target_": targets.qualified_name(type(obj))}
    elsewhere = shared_names(obj)
    for slot in hints.slots(type(obj)) or ():
        if slot.name in elsewhere:
            continue
        try:
            value = getattr(obj, slot.attribute)
            plain = type(value) in _PLAIN
            written[slot.name] = value if plain else _value(value, slot.hint, (*path, slot.name), omitted)
        except _UnwritableError as error:
            omitted.append(error.entry)
    return written


def _value(value: Any, hint: Any, path: Path, omitted: Omitted) -> Any:
    """The written form of one value in a place annotated `hint`."""
    members = hints.alternatives(hint)
    if isinstance(value, Enum):
        if _short(members, type(value)):
            return value.name
        return {"_target_": targets.qualified_name(type(value)), "_name_": value.name}
    if type(value) in _PLAIN:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"_target_": "builtins.float", "_args_": [str(float(value))]}
    if hints.is_dtype(type(value)):
        return str(value) if _short(members, type(value)) else {"_target_": str(value), "_call_": False}
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return _container(value, members, path, omitted)
    if not isinstance(value, type) and hints.slots(type(value)) is not None:
        return _object(value, path, omitted)
    if isinstance(value, partial):
        return _partial(value, path, omitted)
    if callable(value):
        return _named(value, members, path)
    raise _UnwritableError(f"a {type(value).__qualname__} has no written form", path)


def _container(value: Any, members: tuple[Any, ...], path: Path, omitted: Omitted) -> Any:
    if isinstance(value, dict):
        return _mapping(value, members, path, omitted)
    kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
    # A bare list is read as what the annotation says: if that may be another kind, the kind is written out.
    bare = kind is list or _sequence_kinds(members) == {kind}
    path = path if bare else (*path, "_args_", 0)
    items = [_item(item, _item_hint(members, i), (*path, i), omitted) for i, item in enumerate(value)]
    return items if bare else {"_target_": f"builtins.{kind.__name__}", "_args_": [items]}


def _mapping(value: dict[Any, Any], members: tuple[Any, ...], path: Path, omitted: Omitted) -> dict[str, Any]:
    inner = _union([get_args(member)[1] for member in members if get_origin(member) is dict and get_args(member)])
    if all(isinstance(key, str) for key in value) and "_target_" not in value:
        return {key: _item(item, inner, (*path, key), omitted) for key, item in value.items()}
    path = (*path, "_args_", 0)
    pairs = [
        [_item(key, Any, (*path, i, 0), omitted), _item(item, inner, (*path, i, 1), omitted)]
        for i, (key, item) in enumerate(value.items())
    ]
    return {"_target_": "builtins.dict", "_args_": [pairs]}


def _item(item: Any, hint: Any, path: Path, omitted: Omitted) -> Any:
    return item if type(item) in _PLAIN else _value(item, hint, path, omitted)


def _sequence_kinds(members: tuple[Any, ...]) -> set[type]:
    """The sequence types that a written list can be read as in this place."""
    found: set[type] = set()
    for member in members:
        origin = get_origin(member) or member
        if hints.is_any(member):
            found.add(list)
        elif isinstance(origin, type) and origin in (list, tuple, set, frozenset):
            found.add(origin)
        elif hints.is_sequence(origin):
            found.add(list)
    return found or {list}


def _item_hint(members: tuple[Any, ...], index: int) -> Any:
    """What the annotation says about item `index` of a sequence."""
    found = []
    for member in members:
        origin, args = get_origin(member), get_args(member)
        if origin is tuple and args:
            found.append(args[0] if args[-1] is Ellipsis else args[min(index, len(args) - 1)])
        elif args and (origin in (list, set, frozenset) or hints.is_sequence(origin)):
            found.append(args[0])
    return _union(found)


def _union(found: list[Any]) -> Any:
    return _joined(tuple(found)) if found else Any


@cache
def _joined(found: tuple[Any, ...]) -> Any:
    joined = found[0]
    for hint in found[1:]:
        joined = joined | hint
    return joined


def _partial(value: partial[Any], path: Path, omitted: Omitted) -> dict[str, Any]:
    written: dict[str, Any] = {"_target_": _name(value.func, path), "_partial_": True}
    if value.args:
        args = enumerate(value.args)
        written["_args_"] = [_item(arg, Any, (*path, "_args_", i), omitted) for i, arg in args]
    for key, item in value.keywords.items():
        if key.startswith("_"):
            raise _UnwritableError(f"a partial has the private argument {key!r}", path)
        written[key] = _item(item, Any, (*path, key), omitted)
    return written


def _named(value: Any, members: tuple[Any, ...], path: Path) -> Any:
    name = _name(value, path)
    return name if _short(members, type(value)) else {"_target_": name, "_call_": False}


def _name(value: Any, path: Path) -> str:
    name = targets.name_of(value)
    if name is None:
        raise _UnwritableError(f"{value!r} has no importable name", path)
    return name


def _short(members: tuple[Any, ...], kind: type) -> bool:
    """Whether a bare name in this place can only mean a value of type `kind` (an enumeration, dtype, function ...)."""
    readers = [member for member in members if hints.reads_text(member)]
    if hints.is_enum(kind) or hints.is_dtype(kind):
        return readers == [kind]
    return bool(readers) and all(hints.is_callable(member) or hints.is_class(member) for member in readers)
