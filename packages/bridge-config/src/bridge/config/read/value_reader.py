"""Reads values: scalars, lists, mappings, and the mappings that stand for tuples, partials or enumeration members."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from bridge.config.errors import quote_name
from bridge.config.paths import Path
from bridge.config.problems import (
    ProblemList,
    ReadError,
    describe_value,
    make_error,
    make_mismatch_error,
    prefix_path,
    to_path_step,
)
from bridge.config.read.fit import accepts_instance, accepts_value
from bridge.config.read.name_reader import NameReader
from bridge.config.schema.annotations import (
    ANYTHING,
    PYTHON_TYPES,
    Anything,
    Choice,
    Fixed,
    Function,
    Items,
    Mapping,
    Plain,
    Type,
)
from bridge.config.schema.target import Target
from bridge.config.schema.values import EnumMember, ParsedConfig, Partial

_COLLECT: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_BUILTINS = {f"builtins.{kind}": kind for kind in (*_COLLECT, "dict", "float")}
_NOT_FINITE = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}
_SCALARS = frozenset({bool, int, float, type(None)})
_FUNCTION: Type = (Function(),)
_FUNCTION_KINDS = frozenset({Function, Anything})


class ValueReader(NameReader, ABC):
    """Reads the values of one document; configs are left to `read_config`."""

    @abstractmethod
    def read_config(self, data: dict[str, Any], target: Target) -> ParsedConfig:
        """Read the mapping `data` as an instance of the config class `target`."""

    def read_value(self, value: Any, type_: Type) -> Any:
        """Read `value` as the given type."""
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

    def _read_sequence(self, value: Any, type_: Type, named: str = "") -> Any:
        """Read a list as the expected kind of sequence, or as the kind `named`; a live tuple or set stays one."""
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
        # Of a union, report the member that matched the deepest: it is probably the intended one.
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
                read.append(self.read_value(item, type_))
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
        return self.read_config(data, self.find_config_class(data, type_))

    def _try_each(self, attempts: list[Callable[[], Any]]) -> Any:
        """Return the result of the first attempt that raises no ReadError."""
        errors: list[ReadError] = []
        for attempt in attempts:
            try:
                return attempt()
            except ReadError as error:
                errors.append(error)
        # Of a union, report the member that matched the deepest: it is probably the intended one.
        raise max(errors, key=lambda error: max(len(path) for path, _ in error.problems))

    def _read_dict(self, data: dict[Any, Any], member: Mapping | Anything) -> dict[Any, Any]:
        if isinstance(member, Anything):
            return dict(zip(data, self._read_each(data.items(), ANYTHING), strict=True))
        keys = self._read_each(((name, name) for name in data), member.key)
        values = self._read_each(data.items(), member.value)
        return _to_dict(zip(keys, values, ((to_path_step(name),) for name in data), strict=True))

    def _read_builtin(self, data: dict[str, Any], type_: Type, kind: str) -> Any:
        """Read a built-in container or number, written as {_target_: builtins.tuple, _args_: [[...]]}."""
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
        """Read a number that JSON cannot write: an infinity or NaN."""
        if not isinstance(text, str) or text not in _NOT_FINITE:
            raise make_error(f"expected {' or '.join(map(repr, _NOT_FINITE))}, got {describe_value(text)}")
        return self._read_scalar(_NOT_FINITE[text], type_)

    def _read_pairs(self, pairs: list[Any], type_: Type) -> dict[Any, Any]:
        """Read a dict, written as a list of keys and values."""
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
        if unknown_keys := [
            key for key in keywords if not isinstance(key, str) or not key.isidentifier() or key[0] == "_"
        ]:
            raise ReadError([((to_path_step(key),), "unknown key of a partial") for key in unknown_keys])
        if not isinstance(args, list):
            raise make_error(f"expected a list, got {describe_value(args)}", "_args_")
        if type(name) is not str or (function := self._texts.get((id(_FUNCTION), name))) is None:
            with prefix_path("_target_"):
                function = self.read_value(name, _FUNCTION) if type(name) is str else self._read_named(name, _FUNCTION)
        if args:
            with prefix_path("_args_"):
                args = self.read_value(args, ANYTHING)
        if not _SCALARS.issuperset(map(type, keywords.values())):
            keywords = dict(zip(keywords, self._read_each(keywords.items(), ANYTHING), strict=True))
        return Partial(function, args, keywords)

    def _read_enum_member(self, data: dict[str, Any], type_: Type) -> Any:
        """Read an enumeration member, written as {_target_: module.Enum, _name_: member} where a bare name
        would be read as a string.
        """
        # Megatron Bridge also writes the member's value, under `_args_`.
        _check_keys(data, {"_target_", "_name_", "_args_"})
        with prefix_path("_target_"):
            target = self.resolve_class(data.get("_target_"), type_)
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


def _check_keys(data: dict[str, Any], keys: set[str]) -> None:
    """Refuse all keys of `data` except `keys`."""
    if unknown_keys := [key for key in data if key not in keys]:
        *others, last = sorted(keys)
        allowed = f"{', '.join(others)} and {last}"
        raise ReadError(
            [((to_path_step(key),), f"unexpected key; only {allowed} are allowed here") for key in unknown_keys]
        )
