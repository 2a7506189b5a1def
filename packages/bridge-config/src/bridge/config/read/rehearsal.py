"""Reads back what was just written, to warn at writing time about whatever a reader would refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cached_property
from typing import Any, is_typeddict

from bridge.config.errors import TargetError
from bridge.config.paths import Path
from bridge.config.problems import ProblemList, ReadError, describe_value, to_path_step
from bridge.config.read.build import build
from bridge.config.read.generation import check_settings
from bridge.config.read.lookup import LiveLookup, check_builder
from bridge.config.read.reader import Reader, check_file_fields
from bridge.config.schema.annotations import PYTHON_TYPES, Choice, Instance, Plain, Type
from bridge.config.schema.generation import FIELD as GENERATION_FIELD
from bridge.config.schema.generation import GenerationSettings
from bridge.config.schema.inspection import describe
from bridge.config.schema.names import MODEL_CONFIG, get_qualified_name
from bridge.config.schema.target import Target
from bridge.config.schema.values import EnumMember, Named, ParsedConfig, Partial

_PLAIN_TYPES = frozenset[type]().union(*PYTHON_TYPES.values())
_MODEL: Type = (Instance(MODEL_CONFIG),)


class Rehearsal:
    """Reads back one document; `problems` lists what is refused or changed, with paths."""

    def __init__(self) -> None:
        self.problems: ProblemList = []

    @cached_property
    def _reader(self) -> Reader:
        return Reader(LiveLookup(), suggest=False)

    def check_field(
        self, name: str, form: Any, value: Any, type_: Type, target: Target, path: Path, *, is_whole: bool
    ) -> bool:
        """Read the written form of a field; return whether it is read as `value`.

        Args:
            name: the field.
            form: its written form.
            value: the value that was written.
            type_: its annotation.
            target: the class that declares it.
            path: its place in the document.
            is_whole: whether nothing was left out of `form`; otherwise it cannot be read as `value`.
        """
        try:
            read = self._reader.read_field(name, form, type_, target)
        except ReadError as error:
            return self._add_problems(error, path)
        return not is_whole or self._compare(read, value, path)

    def check_config(self, form: dict[str, Any], value: Any, type_: Type, path: Path) -> bool:
        """Check that a config, whose fields were read before, fits a place of this type."""
        try:
            target = self._reader.find_config_class(form, type_)
        except ReadError as error:
            return self._add_problems(error, path)
        self.problems += [((*path, *at), message) for at, message in check_file_fields(form, target)]
        return target.obj is type(value) or self._compare(ParsedConfig(target, {}), value, path)

    def check_document(self, data: dict[str, Any], config: Any) -> None:
        """Check what only a whole document has: its class, its builder and its generation settings."""
        if get_qualified_name(type(config)) == MODEL_CONFIG:
            self.problems.append((("_target_",), f"{MODEL_CONFIG} is the abstract base: name a class derived from it"))
            return
        if not self.check_config(data, config, _MODEL, ()):
            return
        if "builder" in vars(config):
            try:
                check_builder(config.builder, self._reader.find_config_class(data, _MODEL), LiveLookup(), suggest=False)
            except TargetError as error:
                self.problems.append((("_builder_",), str(error)))
        if data.get(GENERATION_FIELD) is not None:
            self.problems += check_settings(data, self._reader.find_config_class(data, _MODEL))

    def _add_problems(self, error: ReadError, path: Path) -> bool:
        self.problems += [((*path, *at), message) for at, message in error.problems]
        return False

    def _compare(self, read: object, value: object, path: Path) -> bool:
        difference = _find_difference(read, value)
        if difference is not None:
            at, message = difference
            self.problems.append(((*path, *at), message))
        return difference is None


def check_plain_values(config: object) -> ProblemList:
    """Check fields that can hold only numbers, strings, booleans or None; embedded configs too.

    Other fields are skipped, since a string in them may be the name of a function or an enumeration member.
    """
    reader = Reader(LiveLookup())
    found: ProblemList = []
    for name, field in describe(type(config)).fields.items():
        value = vars(config).get(field.attribute or name, ...)  # ...: the embedded config holds it
        if type(value) in _PLAIN_TYPES and all(isinstance(member, (Plain, Choice)) for member in field.type):
            try:
                reader.read_value(value, field.type)
            except ReadError as error:
                found += [((name, *at), message) for at, message in error.problems]
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            found += [((name, *at), message) for at, message in check_plain_values(value)]
    return found


def _find_difference(read: Any, value: Any) -> tuple[Path, str] | None:
    """Return the first place where the value read differs from the value written, with a message; None if equal."""
    if isinstance(read, (Named, EnumMember)):
        read = build(read)
    if read is value or isinstance(read, GenerationSettings):
        return None
    if isinstance(read, ParsedConfig):
        return _find_config_difference(read, value)
    if isinstance(read, Partial):
        return _find_first_difference(
            [("_target_", read.function, value.func), ("_args_", read.args, list(value.args))]
        ) or _find_difference(read.keywords, value.keywords)
    if isinstance(value, float) and isinstance(read, float):  # also NaN, and the floats of NumPy
        return (
            None
            if repr(read) == repr(float(value))
            else ((), f"{describe_value(value)} is read back as {describe_value(read)}")
        )
    if type(read) is not type(value):
        return (), _describe_type_change(type(value).__qualname__, type(read).__qualname__)
    if isinstance(value, dict):
        pairs = zip(read.items(), value.items(), strict=True)
        return _find_first_difference((key, left, right) for (key, left), (_, right) in pairs)
    if isinstance(value, (list, tuple)):
        return _find_first_difference(zip(range(len(value)), read, value, strict=True))
    if isinstance(value, (set, frozenset)) and any(isinstance(item, (ParsedConfig, Partial)) for item in read):
        return None if len(read) == len(value) else ((), "equal items are read back as one")
    return None if read == value else ((), f"{describe_value(value)} is read back as {describe_value(read)}")


def _find_config_difference(read: ParsedConfig, value: Any) -> tuple[Path, str] | None:
    fields, is_mapping = read.target.fields, isinstance(value, dict)
    if type(value) is not (dict if is_typeddict(read.target.obj) else read.target.obj):
        return (), _describe_type_change(type(value).__qualname__, read.target.short_name)
    if read.target.open:
        return None
    if is_mapping and read.values.keys() != value.keys():
        return (), "read back with other keys"
    return _find_first_difference(
        (name, item, value[name] if is_mapping else getattr(value, fields[name].attribute or name))
        for name, item in read.values.items()
    )


def _describe_type_change(written: str, read: str) -> str:
    return f"a value of type {written} is read back as one of type {read}"


def _find_first_difference(items: Iterable[tuple[str | int, Any, Any]]) -> tuple[Path, str] | None:
    for key, read, value in items:
        if (found := _find_difference(read, value)) is not None:
            path, message = found
            return (to_path_step(key), *path), message
    return None
