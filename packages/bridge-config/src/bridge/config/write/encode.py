"""Encodes objects as plain data of JSON types; drops nothing silently."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass
from enum import Enum
from functools import lru_cache, partial
from math import isfinite
from typing import Any, Protocol

from bridge.config.errors import quote_name
from bridge.config.paths import Path, format_path
from bridge.config.problems import describe_value
from bridge.config.schema.annotations import (
    ANYTHING,
    Anything,
    Choice,
    Class,
    Dtype,
    Fixed,
    Function,
    Instance,
    Items,
    Mapping,
    Member,
    Plain,
    Type,
)
from bridge.config.schema.generation import GenerationSettings
from bridge.config.schema.inspection import OPEN_CLASSES, describe, describe_annotated, is_dtype
from bridge.config.schema.names import GENERATION_CONFIG
from bridge.config.schema.registrations import get_generation
from bridge.config.schema.registry import find_document_name
from bridge.config.schema.target import Field, Kinds, Target, cache_shape, find_ready_types, get_shape
from bridge.config.schema.values import EnumMember, Made, Named, Partial
from bridge.config.writethrough import get_shared_names

Omitted = list[dict[str, str]]

_PLAIN = frozenset({str, int, bool, type(None)})


class ReadBack(Protocol):
    """Reads what was just written."""

    def field(
        self, name: str, form: Any, value: Any, type_: Type, target: Target, path: Path, *, is_whole: bool
    ) -> bool:
        """Whether the written form of a field gives `value`; it need not if something `is_whole` no more."""
        ...

    def config(self, form: dict[str, Any], value: Any, type_: Type, path: Path) -> bool:
        """Whether a config, whose fields were read already, is one that may stand in a place of this type."""
        ...


class _UnwritableError(Exception):
    """A value has no written form; `path` is where in its document it would stand."""

    def __init__(self, reason: str, path: Path) -> None:
        super().__init__(reason)
        self._reason = reason
        self._path = path

    def entry(self, left_out: Path) -> dict[str, str]:
        """What the document says about `left_out`, the place at or above the value that it goes without."""
        at = "" if left_out == self._path else f"{format_path(self._path)}: "
        return {"path": format_path(left_out), "reason": f"{at}{self._reason}"}


def encode_made(made: Made, builder: str | None) -> dict[str, Any]:
    """Return the document that was read as `made`, in canonical form."""
    data: dict[str, Any] = _encode_standin(made, (), (), [])
    heading = {"_target_": data.pop("_target_"), "_builder_": builder}
    return {key: value for key, value in heading.items() if value is not None} | data


def encode_value(value: object, type_: Type) -> Any:
    """Return the written form of one value in a place of this type; MISSING if it has none."""
    omitted: Omitted = []
    try:
        form = _encode(value, type_, (), omitted)
    except _UnwritableError:
        return MISSING
    return MISSING if omitted else form


def encode_mapping(obj: Any, path: Path, omitted: Omitted, read_back: ReadBack | None = None) -> dict[str, Any]:
    """Return a config as a mapping; leave out what has no written form and add it to `omitted`.

    With `read_back`, every field is read back.
    """
    target = describe(type(obj))
    state = getattr(obj, "__dict__", {})
    shape = get_shape("write", state)
    plan: _Plan | None = target.shapes.get(shape)
    if plan is None:
        cache_shape(target, shape, plan := _make_plan(obj, state, target))
    data = _make_heading(target)
    # What is in the instance is taken as it is there: an attribute may be data that reading makes an object of.
    data |= state if plan.plain else {name: state[at] if at in state else getattr(obj, at) for name, at in plan.all}
    texts = _get_form_cache(get_generation())
    as_they_are = all(map(isfinite, map(data.__getitem__, plan.floats))) and all(
        data[name] in values for name, values in plan.choices
    )
    for name, type_, type_id in plan.written if as_they_are else plan.not_plain:
        value = data[name]
        if type(value) is list and name in plan.lists:
            if plan.lists[name].issuperset(map(type, value)) and _are_plain(value):
                data[name] = value.copy()
                continue
        elif type(value) is partial and (form := _get_cached_partial(value, type_id, texts)) is not None:
            data[name] = form
            continue
        text, known = texts.get((type_id, id(value)), _UNKNOWN)
        if known is value:
            data[name] = text
            continue
        at, left_out = (*path, name), len(omitted)
        try:
            if read_back is not None and _is_config(value):
                data[name] = form = encode_mapping(value, at, omitted, read_back)
                is_read = read_back.config(form, value, type_, at)
            else:
                data[name] = form = _encode(value, type_, at, omitted)
                is_whole = len(omitted) == left_out
                is_read = read_back is None or read_back.field(name, form, value, type_, target, at, is_whole=is_whole)
        except _UnwritableError as error:
            del data[name]
            omitted.append(error.entry(at))
        else:
            if is_read and read_back is not None:
                _remember_form(form, value, type_, texts)
    omitted += [
        {"path": format_path((*path, name)), "reason": "an InitVar, which instances do not keep"}
        for name in plan.dropped
    ]
    if target.open:
        data |= _encode_open_config(obj, path, omitted)
    return data


@dataclass(frozen=True)
class _Plan:
    """How instances of one shape are written: names of their fields, with attributes or types."""

    all: tuple[tuple[str, str], ...]
    not_plain: tuple[tuple[str, Type, int], ...]
    """The fields whose values may have to be written as something else, each with its type and the identity of that;
    all others stand for themselves."""

    floats: tuple[str, ...]
    """Those of them whose values stand for themselves if they are finite."""

    choices: tuple[tuple[str, frozenset[object]], ...]
    """Those of them whose values stand for themselves if they are among these."""

    written: tuple[tuple[str, Type, int], ...]
    """The rest of them."""

    lists: dict[str, Kinds]
    """Those of them that may hold a list, and the types of items that stand for themselves in it."""

    dropped: tuple[str, ...]
    """The fields that an instance does not keep."""

    plain: bool
    """Whether the instance's dictionary has the fields and nothing else, in their order."""


def _make_plan(obj: Any, state: dict[str, Any], target: Target) -> _Plan:
    elsewhere = get_shared_names(obj)
    fields = [one for one in target.fields.values() if one.kept and one.name not in elsewhere]
    kinds = {one.name: type(state.get(one.attribute, ...)) for one in fields}
    ready = {one.name for one in fields if kinds[one.name] in one.ready}
    not_plain = tuple(
        (one.name, one.type, id(one.type)) for one in fields if one.name not in ready or kinds[one.name] is float
    )
    floats = {name for name, _, _ in not_plain if name in ready}
    choices = {name: _find_choices(kinds[name], type_) for name, type_, _ in not_plain if kinds[name] in _PLAIN}
    return _Plan(
        all=tuple((one.name, one.attribute or one.name) for one in fields),
        not_plain=not_plain,
        floats=tuple(floats),
        choices=tuple((name, values) for name, values in choices.items() if values),
        written=tuple(one for one in not_plain if one[0] not in floats and not choices.get(one[0])),
        lists={one.name: items for one in fields if (items := _find_ready_items(one.type)) is not None},
        dropped=tuple(one.name for one in target.fields.values() if not one.kept),
        plain=tuple(state) == tuple(one.attribute for one in fields),
    )


def _find_choices(kind: type, type_: Type) -> frozenset[object]:
    """The values of this type that may stand as they are in a place of `type_`, of those that a `Literal` lists."""
    choices = (member.values for member in type_ if isinstance(member, Choice))
    return frozenset(value for values in choices for value in values if type(value) is kind)


def _find_ready_items(type_: Type) -> Kinds | None:
    """The types of items that stand for themselves in a list; None where no list may stand."""
    for member in type_:
        match member:
            case Items("list", item):
                return find_ready_types(item)
            case Anything():
                return find_ready_types(ANYTHING)
    return None


def _is_config(value: object) -> bool:
    return not isinstance(value, type) and describe(type(value)).kind == "config"


_FormCache = dict[tuple[Any, ...], tuple[Any, object]]
_MAX_FORMS = 10_000


@lru_cache(maxsize=1)
def _get_form_cache(generation: int) -> _FormCache:
    """What values were written as, and read back right, by the identities of type and value, which is kept beside it.

    Of a partial it is the function that is known, by its identity and the names of the arguments.
    """
    return {}


def _remember_form(form: Any, value: object, type_: Type, texts: _FormCache) -> None:
    if len(texts) >= _MAX_FORMS:
        texts.clear()
    if type(form) in _PLAIN:
        texts[id(type_), id(value)] = form, value
    elif type(value) is partial and not value.args and _are_plain(value.keywords.values()):
        texts[id(type_), id(value.func), *value.keywords] = form["_target_"], value.func


def _get_cached_partial(value: partial[Any], type_id: int, texts: _FormCache) -> dict[str, Any] | None:
    """The form of a partial of plain values, if another one of its function was read back in such a place."""
    name, function = texts.get((type_id, id(value.func), *value.keywords), _UNKNOWN)
    if function is not value.func or value.args or not _are_plain(value.keywords.values()):
        return None
    return {"_target_": name, "_partial_": True, **value.keywords}


_UNKNOWN = ("", object())


def _make_heading(target: Target) -> dict[str, Any]:
    if target.schema is None:
        return {"_target_": target.name}
    return {"_target_": target.name, "_version_": target.schema.version}


def _encode_open_config(obj: Any, path: Path, omitted: Omitted) -> dict[str, Any]:
    """What an instance of a class that takes any keyword says of itself."""
    said = getattr(obj, OPEN_CLASSES[describe(type(obj)).name])()
    return {key: _encode_item(value, ANYTHING, (*path, key), omitted) for key, value in said.items() if key[:1] != "_"}


def _encode(value: Any, type_: Type, path: Path, omitted: Omitted) -> Any:
    """The written form of one value in a place of this type."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, partial):
        return _encode_partial(_get_name(value.func, path), value.args, value.keywords, path, omitted)
    if isinstance(value, Enum):
        return _encode_enum_member(value.name, describe(type(value)), type_)
    if isinstance(value, float):
        return float(value) if isfinite(value) else {"_target_": "builtins.float", "_args_": [str(float(value))]}
    if isinstance(value, dict):
        return _encode_dict(value, type_, path, omitted)
    if isinstance(value, tuple) and hasattr(value, "_fields") and _is_config(value):
        return encode_mapping(value, path, omitted)
    if isinstance(value, (list, tuple, set, frozenset)):
        return _encode_sequence(value, type_, path, omitted)
    if is_dtype(type(value)):
        return _encode_named(str(value), Dtype(), type_)
    if isinstance(value, _STANDINS):
        return _encode_standin(value, type_, path, omitted)
    if _is_config(value):
        return encode_mapping(value, path, omitted)
    if callable(value):
        return _encode_named(_get_name(value, path), Function(), type_)
    if (name := find_document_name(value)) is not None:
        return {"_target_": name, "_call_": False}
    raise _UnwritableError(f"a {type(value).__qualname__} has no written form", path)


_STANDINS = (Named, EnumMember, Made, Partial, GenerationSettings)


def _encode_standin(
    value: Named | EnumMember | Made | Partial | GenerationSettings, type_: Type, path: Path, omitted: Omitted
) -> Any:
    """The written form of what was read without making objects."""
    if isinstance(value, EnumMember):
        return _encode_enum_member(value.name, value.target, type_)
    if isinstance(value, Partial):
        return _encode_partial(value.function.target.name, value.args, value.keywords, path, omitted)
    if isinstance(value, Named):
        return _encode_named(value.target.name, Dtype() if value.target.kind == "dtype" else Function(), type_)
    if isinstance(value, GenerationSettings):
        settings = {name: _encode_item(item, ANYTHING, (*path, name), omitted) for name, item in value.items()}
        return {"_target_": GENERATION_CONFIG} | settings
    data = _make_heading(value.target)
    fields = value.target.fields
    for name, item in _in_order(value.values, fields):
        data[name] = _encode(item, fields[name].type if name in fields else ANYTHING, (*path, name), omitted)
    return data


def _in_order(values: dict[str, Any], fields: dict[str, Field]) -> Iterator[tuple[str, Any]]:
    """Values in the order of their fields; what is no field comes last."""
    yield from ((name, values[name]) for name in fields if name in values)
    yield from ((name, value) for name, value in values.items() if name not in fields)


def _encode_sequence(value: Any, type_: Type, path: Path, omitted: Omitted) -> Any:
    if type(value) is list and _are_plain(value):
        return value.copy()
    kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
    # A bare list is read as what the annotation says: if that may be another kind, the kind is written out.
    bare = kind is list or _find_container_kinds(type_) == {kind.__name__}
    path = path if bare else (*path, "_args_", 0)
    items = [_encode_item(item, _get_item_type(type_, i), (*path, i), omitted) for i, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        items.sort(key=_sort_key)
    return items if bare else {"_target_": f"builtins.{kind.__name__}", "_args_": [items]}


def _are_plain(values: Iterable[Any]) -> bool:
    """Whether all of `values` stand for themselves."""
    return all(type(value) in _PLAIN or (type(value) is float and isfinite(value)) for value in values)


def _sort_key(item: Any) -> tuple[str, Any]:
    """Sets are written in an order that does not depend on the process."""
    plain = isinstance(item, (str, int, float))
    return type(item).__name__, item if plain else json.dumps(item, sort_keys=True)


def _encode_dict(value: dict[Any, Any], type_: Type, path: Path, omitted: Omitted) -> dict[str, Any]:
    inner = _join_types(member.value for member in type_ if isinstance(member, Mapping))
    if all(type(key) is str for key in value) and "_target_" not in value:
        data: dict[str, Any] = {}
        for key, item in value.items():
            try:
                data[key] = _encode_item(item, inner, (*path, key), omitted)
            except _UnwritableError as error:
                omitted.append(error.entry((*path, key)))
        return data
    path = (*path, "_args_", 0)
    pairs = [
        [_encode_item(key, ANYTHING, (*path, i, 0), omitted), _encode_item(item, inner, (*path, i, 1), omitted)]
        for i, (key, item) in enumerate(value.items())
    ]
    return {"_target_": "builtins.dict", "_args_": [pairs]}


def _encode_item(item: Any, type_: Type, path: Path, omitted: Omitted) -> Any:
    return item if type(item) in _PLAIN else _encode(item, type_, path, omitted)


def _find_container_kinds(type_: Type) -> set[str]:
    """The kinds of container that a written list can be read as in this place."""
    found: set[str] = set()
    for member in type_:
        match member:
            case Anything():
                found.add("list")
            case Items(kind):
                found.add(kind)
            case Fixed():
                found.add("tuple")
    return found or {"list"}


def _get_item_type(type_: Type, index: int) -> Type:
    """What the annotation says about item `index` of a sequence."""
    found: list[Type] = []
    for member in type_:
        match member:
            case Items(_, item):
                found.append(item)
            case Fixed(items) if items:
                found.append(items[min(index, len(items) - 1)])
    return _join_types(found)


def _join_types(found: Iterable[Type]) -> Type:
    return tuple(dict.fromkeys(member for type_ in found for member in type_)) or ANYTHING


def _encode_partial(
    function: str, args: Iterable[Any], keywords: dict[str, Any], path: Path, omitted: Omitted
) -> dict[str, Any]:
    data: dict[str, Any] = {"_target_": function, "_partial_": True}
    if not args and _are_plain(keywords.values()) and not any(key[:1] == "_" for key in keywords):
        return data | keywords
    if args:
        items = enumerate(args)
        data["_args_"] = [_encode_item(arg, ANYTHING, (*path, "_args_", i), omitted) for i, arg in items]
    for key, item in keywords.items():
        if key.startswith("_"):
            raise _UnwritableError(f"a partial has the private argument {quote_name(key)}", path)
        data[key] = _encode_item(item, ANYTHING, (*path, key), omitted)
    return data


def _encode_enum_member(name: str, enum: Target, type_: Type) -> Any:
    readers = [member for member in type_ if _reads_text(member)]
    if len(readers) == 1 and isinstance(readers[0], Instance) and readers[0].name == enum.name:
        return name
    return {"_target_": enum.name, "_name_": name}


def _encode_named(name: str, kind: Dtype | Function, type_: Type) -> Any:
    """The name alone where it can only mean a dtype, or a function or class; else with a mark that it is the object."""
    readers = [member for member in type_ if _reads_text(member)]
    if readers and (readers == [kind] or all(isinstance(member, (Function, Class)) for member in readers)):
        return name
    return {"_target_": name, "_call_": False}


def _get_name(value: Callable[..., Any], path: Path) -> str:
    name = find_document_name(value)
    if name is None:
        raise _UnwritableError(f"{describe_value(value, 300)} has no importable name", path)
    return name


def _reads_text(member: Member) -> bool:
    """Whether text in a document can stand for a value of `member`."""
    match member:
        case Anything() | Plain("str") | Dtype() | Function() | Class():
            return True
        case Choice(values):
            return any(isinstance(value, str) for value in values)
        case Instance():
            target = describe_annotated(member)
            return target is not None and target.kind == "enum"
        case _:
            return False
