"""Reads documents strictly: reports all problems at once and never runs what a document names.

It checks values against descriptions of classes, which a lookup finds by name among live classes or in the shipped
table. It returns a tree of plain values and of `bridge.config.schema.values`; `read.build` turns it into objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import MISSING
from functools import partial
from typing import Any

from bridge.config.errors import TargetError, did_you_mean, quote_name
from bridge.config.paths import Path, parse_path
from bridge.config.problems import (
    ProblemList,
    ReadError,
    describe_value,
    make_error,
    make_mismatch_error,
    prefix_path,
    to_path_step,
)
from bridge.config.read.cache import Plan, get_caches, make_plan
from bridge.config.read.fit import accepts_instance, accepts_object, accepts_value, describe_kind
from bridge.config.read.lookup import LiveLookup, Lookup
from bridge.config.read.migrate import describe_change
from bridge.config.read.view import View
from bridge.config.schema.annotations import (
    ANYTHING,
    PYTHON_TYPES,
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
from bridge.config.schema.arithmetic import CHECKS, check_fields
from bridge.config.schema.generation import FIELD as GENERATION_FIELD
from bridge.config.schema.generation import GenerationSettings
from bridge.config.schema.ranges import get_ranges
from bridge.config.schema.registrations import get_generation
from bridge.config.schema.table import get_shipped_dtypes
from bridge.config.schema.target import Target, cache_shape, get_shape
from bridge.config.schema.values import EnumMember, Made, Named, Partial
from bridge.config.write.defaults import encode_default

_COLLECT: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_BUILTINS = {f"builtins.{kind}": kind for kind in (*_COLLECT, "dict", "float")}
_NOT_FINITE = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}
_MAX_TEXTS = 10_000
_MAX_HINTS = 20  # suggestions per document: finding the nearest name can take 20 ms
_SCALARS = frozenset({bool, int, float, type(None)})
_NO_NAMES: frozenset[str] = frozenset()
_FUNCTION: Type = (Function(),)
_FUNCTION_KINDS = frozenset({Function, Anything})


class Reader:
    """Reads the values of one document."""

    def __init__(
        self,
        lookup: Lookup,
        omitted: dict[int, set[str]] | None = None,
        *,
        defaults: bool = False,
        suggest: bool = True,
    ) -> None:
        """Make a reader.

        Args:
            lookup: finds what names stand for.
            omitted: the fields that the document says it leaves out, by the identity of the mapping they miss from.
            defaults: whether other fields that it leaves out get their defaults.
            suggest: whether messages about unknown names suggest others.
        """
        self._lookup = lookup
        self._omitted = omitted or {}
        self._defaults = defaults
        self._suggest = suggest
        is_live = isinstance(lookup, LiveLookup)
        self._texts, self._classes = get_caches(get_generation()) if is_live else ({}, {})
        self._hints = _MAX_HINTS
        self._views: dict[int, View] = {}
        """Configs whose fields were checked, by the identity of their mapping."""

    def value(self, value: Any, type_: Type) -> Any:
        """Read `value` in a place of this type."""
        kind = type(value)
        if kind is str:
            return self._texts.get((id(type_), value)) or self._read_text(value, type_)
        if kind is dict:
            return self._read_mapping(value, type_)
        if kind is list:
            return self._read_sequence(value, type_)
        if kind in _SCALARS:
            return self._read_scalar(value, type_)
        if kind in (tuple, set, frozenset):
            return self._read_sequence(value, type_)
        if any(accepts_value(value, member) for member in type_):
            return value
        raise make_mismatch_error(self._describe_type(type_), value)

    def config(self, data: dict[str, Any], target: Target, *, is_document: bool = False) -> Any:
        """Read the mapping, or the whole document, `data` as an instance of the config class `target`."""
        shape = get_shape("document" if is_document else "config", data)
        plan: Plan | None = target.shapes.get(shape)
        if plan is None:
            plan = make_plan(data, target, is_document=is_document)
            if not plan.unknown:  # unknown keys come from the document, which may have a million of them
                cache_shape(target, shape, plan)
        values = dict(data)
        for key in plan.left_out:
            del values[key]
        found: ProblemList = []
        owned = self._find_embedded_fields(data, target) if target.embeds is not None else _NO_NAMES
        if owned:
            belongs = f"belongs to {target.embeds}: give it as {target.embeds}."
            found += [((key,), f"{belongs}{key}") for key in data if key in owned]
        if target.files:
            found += check_file_fields(data, target)
        for key in plan.unknown:
            if key not in owned:
                try:
                    values[key] = self._read_unknown(key, data[key], target, owned)
                except ReadError as error:
                    found += [((to_path_step(key), *path), message) for path, message in error.problems]
        texts = self._texts
        for key, type_ in plan.read:
            value = data[key]
            if type(value) is str and (known := texts.get((id(type_), value))) is not None:
                values[key] = known
                continue
            try:
                values[key] = self.field(key, value, type_, target)
            except ReadError as error:
                if key not in owned:
                    found += [((key, *path), message) for path, message in error.problems]
        found += [((key,), "required, but missing") for key in plan.required if key not in owned]
        found += self._check_fields(data, target, found)
        if found:
            raise ReadError(found)
        missing = plan.missing - owned if target.embeds is not None else plan.missing
        complete = missing <= self._omitted.get(id(data), _NO_NAMES)
        if self._defaults:
            values |= self._read_defaults(target, values, (name for name in target.init_names if name not in owned))
        compared = None if target.hashed is None else self._get_compared(target, values)
        return Made(target, values, compared, complete=complete, composed=plan.composed, in_order=plan.in_order)

    def _get_compared(self, target: Target, values: dict[str, Any]) -> tuple[Any, ...]:
        """Return the values that an instance is compared by."""
        assert target.hashed is not None
        known = values | self._read_defaults(target, values, target.hashed)
        return tuple(known.get(name) for name in target.hashed)

    def _read_defaults(self, target: Target, values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """Read the defaults of those fields in `names` that have no value."""
        found: dict[str, Any] = {}
        hints, self._hints = self._hints, 0  # nobody reads why a default is refused
        for name in names:
            if name not in values and (default := encode_default(target, name)) is not MISSING:
                # It may be one that its annotation denies, or the name of what is not registered.
                with suppress(ReadError):
                    found[name] = self.value(default, target.fields[name].type)
        self._hints = hints
        return found

    def _check_fields(self, data: dict[str, Any], target: Target, known: ProblemList) -> ProblemList:
        """Check the ranges of a config's fields; without problems so far, check them against each other too."""
        ranges = get_ranges(target.bases)
        found: ProblemList = [
            ((name,), said)
            for name, allowed in ranges.items()
            if (value := data.get(name)) is not None and (said := allowed.problem(value))
        ]
        if known:
            found = [problem for problem in found if problem[0] not in {path[:1] for path, _ in known}]
        if found or known or CHECKS.keys().isdisjoint(target.bases):
            return found
        embedded = data.get(target.embeds) if target.embeds is not None else None
        view = self._views[id(data)] = View(data, target, self._views.get(id(embedded), embedded))
        return [(parse_path(path), said) for path, said in check_fields(view, target.bases)]

    def field(self, key: str, value: Any, type_: Type, target: Target) -> Any:
        """Read the value of a field; generation settings may stay data, see `bridge.config.schema.generation`."""
        if key != GENERATION_FIELD or (lookup := self._lookup.for_settings(target, value)) is None:
            return self.value(value, type_)
        read = Reader(lookup, self._omitted).value(value, ANYTHING)
        return GenerationSettings(read.values) if isinstance(read, Made) else read

    def _read_unknown(self, key: Any, value: Any, target: Target, inner: Iterable[str]) -> Any:
        """Read a key that is not a field; refuse it unless the class accepts any keyword."""
        if target.open and isinstance(key, str) and key.isidentifier() and not key.startswith("_"):
            return self.value(value, ANYTHING)
        hint = ""
        if isinstance(key, str):
            became = describe_change(target, key)
            hint = f": it {became}" if became else self._suggest_name(key, target.fields)
            hint = hint or self._suggest_name(key, inner, prefix=f"{target.embeds}.")
        raise make_error(f"unknown key of {target.short_name}{hint}")

    def _suggest_name(self, name: str, known: Iterable[str], *, prefix: str = "") -> str:
        """Return the suggestion at the end of a message about an unknown name, see `did_you_mean`."""
        self._hints -= 1
        return did_you_mean(name, known, prefix=prefix) if self._hints >= 0 else ""

    def _find_embedded_fields(self, data: dict[str, Any], target: Target) -> frozenset[str]:
        """Return the fields that the config in `target.embeds` owns."""
        assert target.embeds is not None
        value = data.get(target.embeds)
        try:
            if isinstance(value, dict):
                return self.class_in(value, target.fields[target.embeds].type).field_names
        except ReadError:
            pass
        return frozenset(getattr(type(value), "__dataclass_fields__", ()))

    def class_named(self, name: object, type_: Type) -> Target:
        """Return the class called `name`, which must derive from one of those in `type_`."""
        target = self._resolve(name, type_)
        for member in type_:
            if accepts_instance(member, target):
                return target
        raise make_error(f"expected {self._describe_type(type_)}, but {name!r} is {describe_kind(target)}")

    def class_in(self, data: dict[str, Any], type_: Type) -> Target:
        """Return the config class of which the mapping `data` describes an instance."""
        if "_target_" in data:
            name = data["_target_"]
            if type(name) is str and (known := self._classes.get((id(type_), name))) is not None:
                return known
            with prefix_path("_target_"):
                target = self.class_named(name, type_)
                if target.kind != "config":
                    raise make_error(f"{name!r} is not a config: documents describe only dataclasses")
                self._classes[id(type_), target.name] = target
                return target
        candidates = [
            target for target in map(self._get_target, type_) if target is not None and target.kind == "config"
        ]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise make_error("missing '_target_': " + " or ".join(repr(target.name) for target in candidates))
        raise make_mismatch_error(self._describe_type(type_), data)

    def _get_target(self, member: Member) -> Target | None:
        return self._lookup.of(member) if isinstance(member, Instance) else None

    def _read_scalar(self, value: Any, type_: Type) -> Any:
        for member in type_:
            match member:
                case Plain(kind) if type(value) in PYTHON_TYPES[kind]:
                    return value
                case Choice(values) if _is_among(value, values):
                    return value
                case Anything():
                    return value
        raise make_mismatch_error(self._describe_type(type_), value)

    def _read_text(self, value: str, type_: Type) -> Any:
        texts = self._texts
        if len(texts) >= _MAX_TEXTS:
            texts.clear()
        read = texts[id(type_), value] = self._resolve_text(value, type_)
        return read

    def _resolve_text(self, value: str, type_: Type) -> Any:
        known: list[str] = []
        for member in type_:
            match member:
                case Plain("str") | Anything():
                    return value
                case Choice(values):
                    if value in values:
                        return value
                    known += [choice for choice in values if isinstance(choice, str)]
                case Dtype():
                    if (dtype := self._lookup.dtype(value)) is not None:
                        return Named(dtype)
                    known += [prefix + name for prefix in ("torch.", "") for name in get_shipped_dtypes()]
                case Instance(only=only) if (enum := self._lookup.of(member)) and enum.kind == "enum":
                    if value in (only or enum.members):
                        return EnumMember(enum, value)
                    known += only or enum.members
        if any(isinstance(member, (Function, Class)) for member in type_):
            return self._read_named(value, type_)
        raise make_mismatch_error(self._describe_type(type_), value, self._suggest_name(value, known))

    def _read_sequence(self, value: Any, type_: Type, named: str = "") -> Any:
        """A list as the kind of sequence that the place asks for, or as the kind `named`; a live tuple or set as is."""
        errors: list[ReadError] = []
        bare = type(value) is list and not named
        kind = named or type(value).__name__
        for member in type_:
            try:
                match member:
                    case Items(wanted, item) if bare or wanted == kind:
                        return _to_container(wanted, self._read_each(enumerate(value), item) if value else [])
                    case Fixed(items) if bare or kind == "tuple":
                        return self._read_fixed(value, items)
                    case Anything():
                        return (
                            _to_container(kind, self._read_each(enumerate(value), ANYTHING)) if bare or named else value
                        )
            except ReadError as error:
                errors.append(error)
        if not errors:
            raise make_error(
                f"expected {self._describe_type(type_)}, got {f'a {named}' if named else describe_value(value)}"
            )
        # Of a union's members, the one that fits farthest down is the one that was meant.
        raise max(errors, key=lambda error: max(len(path) for path, _ in error.problems))

    def _read_fixed(self, value: Any, items: tuple[Type, ...]) -> tuple[Any, ...]:
        found: ProblemList = [((i,), "required, but missing") for i in range(len(value), len(items))]
        if len(value) > len(items):
            found.append(((len(items),), f"expected a list of {len(items)} items"))
        try:
            read = self._read_items((i, item, of) for i, (item, of) in enumerate(zip(value, items, strict=False)))
        except ReadError as error:
            found = error.problems + found
        if found:
            raise ReadError(found)
        return tuple(read)

    def _read_each(self, items: Iterable[tuple[Any, Any]], type_: Type) -> list[Any]:
        return self._read_items((key, item, type_) for key, item in items)

    def _read_items(self, items: Iterable[tuple[Any, Any, Type]]) -> list[Any]:
        found: ProblemList = []
        read = []
        for key, item, type_ in items:
            try:
                read.append(self.value(item, type_))
            except ReadError as error:
                found += [((to_path_step(key), *path), message) for path, message in error.problems]
        if found:
            raise ReadError(found)
        return read

    def _read_mapping(self, data: dict[str, Any], type_: Type) -> Any:
        name = data.get("_target_")
        if type(name) is str and name in _BUILTINS:
            return self._read_builtin(data, type_, _BUILTINS[name])
        if "_target_" not in data:
            found = [member for member in type_ if isinstance(member, (Mapping, Anything))]
            if found:
                return self._try_each([partial(self._read_dict, data, member) for member in found])
        if "_partial_" in data:
            return self._read_partial(data, type_)
        if "_name_" in data:
            return self._read_enum_member(data, type_)
        if "_call_" in data:
            _check_keys(data, {"_target_", "_call_"})
            if data["_call_"] is not False:
                raise make_error("must be false: documents cannot call functions", "_call_")
            with prefix_path("_target_"):
                return self._read_named(data.get("_target_"), type_)
        return self.config(data, self.class_in(data, type_))

    def _try_each(self, attempts: list[Callable[[], Any]]) -> Any:
        """Return the result of the first attempt that raises no ReadError."""
        errors: list[ReadError] = []
        for attempt in attempts:
            try:
                return attempt()
            except ReadError as error:
                errors.append(error)
        # Of a union's members, the one that fits farthest down is the one that was meant.
        raise max(errors, key=lambda error: max(len(path) for path, _ in error.problems))

    def _read_dict(self, data: dict[Any, Any], member: Mapping | Anything) -> dict[Any, Any]:
        if isinstance(member, Anything):
            return dict(zip(data, self._read_each(data.items(), ANYTHING), strict=True))
        keys = self._read_each(((name, name) for name in data), member.key)
        values = self._read_each(data.items(), member.value)
        return _to_dict(zip(keys, values, ((to_path_step(name),) for name in data), strict=True))

    def _read_builtin(self, data: dict[str, Any], type_: Type, kind: str) -> Any:
        """A built-in container or number, written as {_target_: builtins.tuple, _args_: [[...]]}."""
        _check_keys(data, {"_target_", "_args_"})
        args = data.get("_args_")
        if not isinstance(args, list) or len(args) != 1:
            raise make_error("expected a list of one value", "_args_")
        with prefix_path("_args_", 0):
            if kind == "float":
                return self._read_not_finite(args[0], type_)
            if not isinstance(args[0], list):
                raise make_error(f"expected a list, got {describe_value(args[0])}")
            return self._read_pairs(args[0], type_) if kind == "dict" else self._read_sequence(args[0], type_, kind)

    def _read_not_finite(self, text: Any, type_: Type) -> Any:
        """A number that JSON has no notation for."""
        if not isinstance(text, str) or text not in _NOT_FINITE:
            raise make_error(f"expected {' or '.join(map(repr, _NOT_FINITE))}, got {describe_value(text)}")
        return self._read_scalar(_NOT_FINITE[text], type_)

    def _read_pairs(self, pairs: list[Any], type_: Type) -> dict[Any, Any]:
        """A dict, written as a list of its keys and values."""
        found = [member for member in type_ if isinstance(member, (Mapping, Anything))]
        if not found:
            raise make_error(f"expected {self._describe_type(type_)}, got a mapping")
        read: dict[Any, Any] = self._try_each([partial(self._read_pairs_as, pairs, member) for member in found])
        return read

    def _read_pairs_as(self, pairs: list[Any], member: Mapping | Anything) -> dict[Any, Any]:
        key, value = (member.key, member.value) if isinstance(member, Mapping) else (ANYTHING, ANYTHING)
        read = self._read_each(enumerate(pairs), (Fixed((key, value)),))
        return _to_dict((name, item, (i, 0)) for i, (name, item) in enumerate(read))

    def _read_partial(self, data: dict[str, Any], type_: Type) -> Any:
        if _FUNCTION_KINDS.isdisjoint(map(type, type_)):
            raise make_error(f"expected {self._describe_type(type_)}, got a partial", "_partial_")
        keywords = dict(data)
        name, args = keywords.pop("_target_", None), keywords.pop("_args_", [])
        if (mark := keywords.pop("_partial_")) is not True:
            raise make_error(f"expected true, got {describe_value(mark)}", "_partial_")
        if strange := [key for key in keywords if not isinstance(key, str) or not key.isidentifier() or key[0] == "_"]:
            raise ReadError([((to_path_step(key),), "unknown key of a partial") for key in strange])
        if not isinstance(args, list):
            raise make_error(f"expected a list, got {describe_value(args)}", "_args_")
        if type(name) is not str or (function := self._texts.get((id(_FUNCTION), name))) is None:
            with prefix_path("_target_"):
                function = self.value(name, _FUNCTION) if type(name) is str else self._read_named(name, _FUNCTION)
        if args:
            with prefix_path("_args_"):
                args = self.value(args, ANYTHING)
        if not _SCALARS.issuperset(map(type, keywords.values())):
            keywords = dict(zip(keywords, self._read_each(keywords.items(), ANYTHING), strict=True))
        return Partial(function, args, keywords)

    def _read_enum_member(self, data: dict[str, Any], type_: Type) -> Any:
        """An enumeration member, written as {_target_: module.Enum, _name_: member} where its name would be text."""
        # Megatron Bridge also writes the member's value, under `_args_`.
        _check_keys(data, {"_target_", "_name_", "_args_"})
        with prefix_path("_target_"):
            target = self.class_named(data.get("_target_"), type_)
            if target.kind != "enum":
                raise make_error(f"{data['_target_']!r} is not an enumeration")
        name = data["_name_"]
        members = [
            one
            for member in type_
            if accepts_instance(member, target)
            for one in getattr(member, "only", ()) or target.members
        ]
        if not isinstance(name, str) or name not in members:
            near = self._suggest_name(name, members) if isinstance(name, str) else ""
            if isinstance(name, str) and name in target.members:
                raise make_error(f"expected one of {', '.join(members)}, got {name!r}", "_name_")
            raise make_error(
                f"{target.short_name} has no member {quote_name(name) if near else describe_value(name)}{near}",
                "_name_",
            )
        return EnumMember(target, name)

    def _read_named(self, name: object, type_: Type) -> Any:
        """Read a name as the object itself, if that fits the place."""
        target = self._resolve(name, type_)
        if not any(accepts_object(target, member) for member in type_):
            raise make_error(f"expected {self._describe_type(type_)}, but {name!r} is {describe_kind(target)}")
        return Named(target)

    def _resolve(self, name: object, type_: Type) -> Target:
        """Resolve `name`. Classes that the annotation names come from code and need no registration."""
        if not isinstance(name, str):
            raise make_error(f"expected a name, got {describe_value(name)}")
        try:
            for member in type_:
                own = member.name if isinstance(member, Instance) else getattr(member, "bound", None)
                if own == name and (target := self._lookup.of(member)) is not None:  # type: ignore[arg-type]
                    return target
            return self._lookup.named(name, suggest=self._suggest and self._hints > 0)
        except TargetError as error:
            self._hints -= 1
            raise make_error(str(error)) from error

    def _describe_type(self, type_: Type) -> str:
        """Describe the expected values for an error message."""
        words = [self._describe_member(member) for member in type_ if member != Plain("null")]
        return " or ".join(dict.fromkeys(words)) or "null"

    def _describe_member(self, member: Member) -> str:
        match member:
            case Plain(kind):
                return _WORDS[kind]
            case Choice(values):
                return "one of " + ", ".join(repr(value) for value in values)
            case Instance(name, _, only):
                target = self._lookup.of(member)
                if target is not None and target.kind == "enum":
                    return f"one of {', '.join(only or target.members)}"
                return f"a {name.rpartition('.')[2]}"
            case _:
                return _WORDS[type(member)]


_WORDS: dict[object, str] = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "null": "null",
    Items: "a list",
    Fixed: "a list",
    Mapping: "a mapping",
    Dtype: "a dtype such as 'torch.bfloat16'",
    Function: "the name of a function",
    Class: "the name of a class",
    Anything: "a value",
}


def _is_among(value: object, choices: tuple[object, ...]) -> bool:
    # 1 == True and 1 == 1.0: the type counts too.
    return any(type(choice) is type(value) and choice == value for choice in choices)


def _to_dict(items: Iterable[tuple[Any, Any, Path]]) -> dict[Any, Any]:
    """Build a dict from keys and values; each comes with the path of its key, relative to the current value."""
    read: dict[Any, Any] = {}
    for key, value, path in items:
        try:
            is_new = key not in read
        except TypeError:
            raise make_error("a key must be a scalar", *path) from None
        if not is_new:
            raise make_error("duplicate key", *path)
        read[key] = value
    return read


def _to_container(kind: str, items: list[Any]) -> Any:
    try:
        return _COLLECT[kind](items)
    except TypeError:
        raise make_error("expected a list of plain values") from None


def check_file_fields(data: dict[str, Any], target: Target) -> ProblemList:
    """Check that no field makes the constructor open a file."""
    found: ProblemList = []
    for name, content in target.files.items():
        if not data.get(content):
            said = f"documents cannot name files to read: give the file's content as {content}"
            found.append(((name,), said) if name in data else ((content,), "required, but missing"))
    return found


def _check_keys(data: dict[str, Any], keys: set[str]) -> None:
    """Refuse all keys of `data` except `keys`."""
    if strange := [key for key in data if key not in keys]:
        beside = " and ".join(sorted(keys & data.keys()))
        raise ReadError([((to_path_step(key),), f"unknown key beside {beside}") for key in strange])
