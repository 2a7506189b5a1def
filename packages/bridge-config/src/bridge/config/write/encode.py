"""Encodes objects as plain data of JSON types; lists in `_omitted_` whatever it leaves out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING
from enum import Enum
from functools import partial
from math import isfinite
from typing import Any, Protocol

from bridge.config.errors import quote_name
from bridge.config.paths import Path, format_path
from bridge.config.problems import describe_value
from bridge.config.schema.annotations import ANYTHING, Dtype, Function, Mapping, Type
from bridge.config.schema.generation import GenerationSettings
from bridge.config.schema.inspection import OPEN_CLASSES, describe, is_dtype
from bridge.config.schema.names import GENERATION_CONFIG
from bridge.config.schema.registry import find_document_name
from bridge.config.schema.registry_state import get_generation
from bridge.config.schema.target import Field, Target, cache_shape, get_shape
from bridge.config.schema.values import EnumMember, Named, ParsedConfig, Partial
from bridge.config.write.cache import (
    UNKNOWN,
    FormCache,
    Plan,
    get_cached_partial,
    get_form_cache,
    make_plan,
    remember_form,
)
from bridge.config.write.notation import (
    PLAIN,
    are_plain,
    encode_enum_member,
    encode_named,
    find_container_kinds,
    get_item_type,
    join_types,
)

Omitted = list[dict[str, str]]


class ReadBack(Protocol):
    """Reads back what was just written."""

    def check_field(
        self, name: str, form: Any, value: Any, type_: Type, target: Target, path: Path, *, is_whole: bool
    ) -> bool:
        """Return whether the form of a field is read as `value`; not expected if it is not whole."""
        ...

    def check_config(self, form: dict[str, Any], value: Any, type_: Type, path: Path) -> bool:
        """Return whether a config, whose fields were read before, fits a place of this type."""
        ...


class _UnwritableError(Exception):
    """A value has no written form; `path` is its place in the document."""

    def __init__(self, reason: str, path: Path) -> None:
        super().__init__(reason)
        self._reason = reason
        self._path = path

    def make_entry(self, left_out: Path) -> dict[str, str]:
        """Return the entry of `_omitted_` for `left_out`: the path of the value, or of one that contains it."""
        at = "" if left_out == self._path else f"{format_path(self._path)}: "
        return {"path": format_path(left_out), "reason": f"{at}{self._reason}"}


def encode_parsed_config(parsed: ParsedConfig, builder: str | None) -> dict[str, Any]:
    """Return the document that was read as `parsed`, in canonical form."""
    data: dict[str, Any] = _encode_standin(parsed, (), (), [])
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
    plan: Plan | None = target.shapes.get(shape)
    if plan is None:
        cache_shape(target, shape, plan := make_plan(obj, state, target))
    data = _make_heading(target)
    # Values come from `__dict__` where they are there: reading an attribute may turn data into an object.
    data |= state if plan.plain else {name: state[at] if at in state else getattr(obj, at) for name, at in plan.all}
    forms = get_form_cache(get_generation())
    as_they_are = all(map(isfinite, map(data.__getitem__, plan.floats))) and all(
        data[name] in values for name, values in plan.choices
    )
    for name, type_, type_id in plan.written if as_they_are else plan.not_plain:
        value = data[name]
        if (form := _find_form(name, value, type_id=type_id, plan=plan, forms=forms)) is not MISSING:
            data[name] = form
            continue
        try:
            form, is_read = _encode_field(
                name, value, type_=type_, target=target, path=(*path, name), omitted=omitted, read_back=read_back
            )
        except _UnwritableError as error:
            del data[name]
            omitted.append(error.make_entry((*path, name)))
            continue
        data[name] = form
        if is_read:
            remember_form(form, value, type_, forms)
    omitted += [
        {"path": format_path((*path, name)), "reason": "an InitVar, which instances do not keep"}
        for name in plan.dropped
    ]
    if target.open:
        data |= _encode_open_config(obj, path, omitted)
    return data


def _find_form(name: str, value: Any, *, type_id: int, plan: Plan, forms: FormCache) -> Any:
    """Return the written form of a field's value that is a list of plain values, or in the cache; otherwise MISSING."""
    if type(value) is list and name in plan.lists:
        if plan.lists[name].issuperset(map(type, value)) and are_plain(value):
            return value.copy()
    elif type(value) is partial and (form := get_cached_partial(value, type_id, forms)) is not None:
        return form
    form, known = forms.get((type_id, id(value)), UNKNOWN)
    return form if known is value else MISSING


def _encode_field(
    name: str,
    value: Any,
    *,
    type_: Type,
    target: Target,
    path: Path,
    omitted: Omitted,
    read_back: ReadBack | None,
) -> tuple[Any, bool]:
    """Return the written form of a field, which is at `path`, and whether `read_back` read it as its value."""
    if read_back is None:
        return _encode(value, type_, path, omitted), False
    if _is_config(value):
        form = encode_mapping(value, path, omitted, read_back)
        return form, read_back.check_config(form, value, type_, path)
    left_out = len(omitted)
    form = _encode(value, type_, path, omitted)
    is_whole = len(omitted) == left_out
    return form, read_back.check_field(name, form, value, type_, target, path, is_whole=is_whole)


def _is_config(value: object) -> bool:
    return not isinstance(value, type) and describe(type(value)).kind == "config"


def _make_heading(target: Target) -> dict[str, Any]:
    if target.schema is None:
        return {"_target_": target.name}
    return {"_target_": target.name, "_version_": target.schema.version}


def _encode_open_config(obj: Any, path: Path, omitted: Omitted) -> dict[str, Any]:
    """Return the public values of an instance whose class accepts any keyword."""
    values = getattr(obj, OPEN_CLASSES[describe(type(obj)).name])()
    return {
        key: _encode_item(value, ANYTHING, (*path, key), omitted) for key, value in values.items() if key[:1] != "_"
    }


def _encode(value: Any, type_: Type, path: Path, omitted: Omitted) -> Any:
    """Return the written form of one value in a place of this type."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, partial):
        return _encode_partial(_get_name(value.func, path), value.args, value.keywords, path, omitted)
    if isinstance(value, Enum):
        return encode_enum_member(value.name, describe(type(value)), type_)
    if isinstance(value, float):
        return float(value) if isfinite(value) else {"_target_": "builtins.float", "_args_": [str(float(value))]}
    if isinstance(value, dict):
        return _encode_dict(value, type_, path, omitted)
    if isinstance(value, tuple) and hasattr(value, "_fields") and _is_config(value):
        return encode_mapping(value, path, omitted)
    if isinstance(value, (list, tuple, set, frozenset)):
        return _encode_sequence(value, type_, path, omitted)
    if is_dtype(type(value)):
        return encode_named(str(value), Dtype(), type_)
    if isinstance(value, _STANDINS):
        return _encode_standin(value, type_, path, omitted)
    if _is_config(value):
        return encode_mapping(value, path, omitted)
    if callable(value):
        return encode_named(_get_name(value, path), Function(), type_)
    if (name := find_document_name(value)) is not None:
        return {"_target_": name, "_call_": False}
    raise _UnwritableError(f"a {type(value).__qualname__} has no written form", path)


_STANDINS = (Named, EnumMember, ParsedConfig, Partial, GenerationSettings)


def _encode_standin(
    value: Named | EnumMember | ParsedConfig | Partial | GenerationSettings, type_: Type, path: Path, omitted: Omitted
) -> Any:
    """Return the written form of a value that was read without building objects."""
    if isinstance(value, EnumMember):
        return encode_enum_member(value.name, value.target, type_)
    if isinstance(value, Partial):
        return _encode_partial(value.function.target.name, value.args, value.keywords, path, omitted)
    if isinstance(value, Named):
        return encode_named(value.target.name, Dtype() if value.target.kind == "dtype" else Function(), type_)
    if isinstance(value, GenerationSettings):
        settings = {name: _encode_item(item, ANYTHING, (*path, name), omitted) for name, item in value.items()}
        return {"_target_": GENERATION_CONFIG} | settings
    data = _make_heading(value.target)
    fields = value.target.fields
    for name, item in _sort_values(value.values, fields):
        data[name] = _encode(item, fields[name].type if name in fields else ANYTHING, (*path, name), omitted)
    return data


def _sort_values(values: dict[str, Any], fields: dict[str, Field]) -> Iterator[tuple[str, Any]]:
    """Yield values in the order of their fields; keys that are not fields come last."""
    yield from ((name, values[name]) for name in fields if name in values)
    yield from ((name, value) for name, value in values.items() if name not in fields)


def _encode_sequence(value: Any, type_: Type, path: Path, omitted: Omitted) -> Any:
    if type(value) is list and are_plain(value):
        return value.copy()
    kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
    # A list without a mark is read as the annotated kind, so any other kind is written out.
    bare = kind is list or find_container_kinds(type_) == {kind.__name__}
    path = path if bare else (*path, "_args_", 0)
    items = [_encode_item(item, get_item_type(type_, i), (*path, i), omitted) for i, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        items.sort(key=_sort_key)
    return items if bare else {"_target_": f"builtins.{kind.__name__}", "_args_": [items]}


def _sort_key(item: Any) -> tuple[str, Any]:
    """Return a key that sorts the items of a set the same way in every process."""
    plain = isinstance(item, (str, int, float))
    return type(item).__name__, item if plain else json.dumps(item, sort_keys=True)


def _encode_dict(value: dict[Any, Any], type_: Type, path: Path, omitted: Omitted) -> dict[str, Any]:
    inner = join_types(member.value for member in type_ if isinstance(member, Mapping))
    if all(type(key) is str for key in value) and "_target_" not in value:
        data: dict[str, Any] = {}
        for key, item in value.items():
            try:
                data[key] = _encode_item(item, inner, (*path, key), omitted)
            except _UnwritableError as error:
                omitted.append(error.make_entry((*path, key)))
        return data
    path = (*path, "_args_", 0)
    pairs = [
        [_encode_item(key, ANYTHING, (*path, i, 0), omitted), _encode_item(item, inner, (*path, i, 1), omitted)]
        for i, (key, item) in enumerate(value.items())
    ]
    return {"_target_": "builtins.dict", "_args_": [pairs]}


def _encode_item(item: Any, type_: Type, path: Path, omitted: Omitted) -> Any:
    return item if type(item) in PLAIN else _encode(item, type_, path, omitted)


def _encode_partial(
    function: str, args: Iterable[Any], keywords: dict[str, Any], path: Path, omitted: Omitted
) -> dict[str, Any]:
    data: dict[str, Any] = {"_target_": function, "_partial_": True}
    if not args and are_plain(keywords.values()) and not any(key[:1] == "_" for key in keywords):
        return data | keywords
    if args:
        items = enumerate(args)
        data["_args_"] = [_encode_item(arg, ANYTHING, (*path, "_args_", i), omitted) for i, arg in items]
    for key, item in keywords.items():
        if key.startswith("_"):
            raise _UnwritableError(f"a partial has the private argument {quote_name(key)}", path)
        data[key] = _encode_item(item, ANYTHING, (*path, key), omitted)
    return data


def _get_name(value: Callable[..., Any], path: Path) -> str:
    name = find_document_name(value)
    if name is None:
        raise _UnwritableError(f"{describe_value(value, 300)} has no importable name", path)
    return name
