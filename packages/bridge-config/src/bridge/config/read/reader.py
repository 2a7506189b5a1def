"""Reads configs strictly: reports all problems at once and never runs what a document names.

It checks values against descriptions of classes, which a lookup finds by name among live classes or in the shipped
table. It returns a tree of plain values and of `bridge.config.schema.values`; `read.build` turns it into objects.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import MISSING
from typing import Any

from bridge.config.paths import parse_path
from bridge.config.problems import ProblemList, ReadError, make_error, to_path_step
from bridge.config.read.cache import Plan, make_plan
from bridge.config.read.lookup import Lookup
from bridge.config.read.migrate import describe_change
from bridge.config.read.value_reader import ValueReader
from bridge.config.read.view import View
from bridge.config.schema.annotations import ANYTHING, Type
from bridge.config.schema.arithmetic import CHECKS, check_fields
from bridge.config.schema.generation import FIELD as GENERATION_FIELD
from bridge.config.schema.generation import GenerationSettings
from bridge.config.schema.ranges import get_ranges
from bridge.config.schema.target import Target, cache_shape, get_shape
from bridge.config.schema.values import ParsedConfig
from bridge.config.write.encoded_defaults import encode_default

_NO_NAMES: frozenset[str] = frozenset()


class Reader(ValueReader):
    """Reads the configs of one document."""

    def __init__(
        self,
        lookup: Lookup,
        omitted: dict[int, set[str]] | None = None,
        *,
        defaults: bool = False,
        suggest: bool = True,
    ) -> None:
        """Create a reader.

        Args:
            lookup: finds what names stand for.
            omitted: the fields that `_omitted_` lists, by the id of the mapping that lacks them.
            defaults: whether to fill in the defaults of missing fields.
            suggest: whether messages about unknown names suggest others.
        """
        super().__init__(lookup, suggest=suggest)
        self._omitted = omitted or {}
        self._defaults = defaults
        self._views: dict[int, View] = {}
        """Configs whose fields were checked, by the id of their mapping."""

    def read_config(self, data: dict[str, Any], target: Target, *, is_document: bool = False) -> ParsedConfig:
        """Read the mapping, or the whole document, `data` as an instance of the config class `target`."""
        plan = _get_plan(data, target, is_document=is_document)
        owned = self._find_embedded_fields(data, target) if target.embeds is not None else _NO_NAMES
        found: ProblemList = []
        if owned:
            belongs = f"belongs to {target.embeds}: give it as {target.embeds}."
            found += [((key,), f"{belongs}{key}") for key in data if key in owned]
        if target.files:
            found += check_file_fields(data, target)
        values = self._read_values(data, target, plan=plan, owned=owned, found=found)
        found += [((key,), "required, but missing") for key in plan.required if key not in owned]
        found += self._check_fields(data, target, found)
        if found:
            raise ReadError(found)
        missing = plan.missing - owned if target.embeds is not None else plan.missing
        complete = missing <= self._omitted.get(id(data), _NO_NAMES)
        if self._defaults:
            values |= self._read_defaults(target, values, (name for name in target.init_names if name not in owned))
        compared = None if target.hashed is None else self._get_compared(target, values)
        return ParsedConfig(target, values, compared, complete=complete, composed=plan.composed, in_order=plan.in_order)

    def _read_values(
        self, data: dict[str, Any], target: Target, *, plan: Plan, owned: frozenset[str], found: ProblemList
    ) -> dict[str, Any]:
        """Read the values of a config; add the problems to `found`, except with the fields that are `owned`."""
        values = dict(data)
        for key in plan.left_out:
            del values[key]
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
                values[key] = self.read_field(key, value, type_, target)
            except ReadError as error:
                if key not in owned:
                    found += [((key, *path), message) for path, message in error.problems]
        return values

    def _get_compared(self, target: Target, values: dict[str, Any]) -> tuple[Any, ...]:
        """Return the values that an instance is compared by."""
        assert target.hashed is not None
        known = values | self._read_defaults(target, values, target.hashed)
        return tuple(known.get(name) for name in target.hashed)

    def _read_defaults(self, target: Target, values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """Read the defaults of those fields in `names` that have no value."""
        found: dict[str, Any] = {}
        hints, self._hints = self._hints, 0  # suggestions would be thrown away
        for name in names:
            if name not in values and (default := encode_default(target, name)) is not MISSING:
                # A default may contradict its annotation, or name an object that is not registered.
                with suppress(ReadError):
                    found[name] = self.read_value(default, target.fields[name].type)
        self._hints = hints
        return found

    def _check_fields(self, data: dict[str, Any], target: Target, known: ProblemList) -> ProblemList:
        """Check the ranges of a config's fields; without problems so far, check them against each other too."""
        ranges = get_ranges(target.bases)
        found: ProblemList = [
            ((name,), message)
            for name, allowed in ranges.items()
            if (value := data.get(name)) is not None and (message := allowed.find_problem(value))
        ]
        if known:
            found = [problem for problem in found if problem[0] not in {path[:1] for path, _ in known}]
        if found or known or CHECKS.keys().isdisjoint(target.bases):
            return found
        embedded = data.get(target.embeds) if target.embeds is not None else None
        view = self._views[id(data)] = View(data, target, self._views.get(id(embedded), embedded))
        return [(parse_path(path), message) for path, message in check_fields(view, target.bases)]

    def read_field(self, key: str, value: Any, type_: Type, target: Target) -> Any:
        """Read the value of a field; generation settings may stay data, see `bridge.config.schema.generation`."""
        if key != GENERATION_FIELD or (lookup := self._lookup.lookup_for_generation_settings(target, value)) is None:
            return self.read_value(value, type_)
        read = Reader(lookup, self._omitted).read_value(value, ANYTHING)
        return GenerationSettings(read.values) if isinstance(read, ParsedConfig) else read

    def _read_unknown(self, key: Any, value: Any, target: Target, inner: Iterable[str]) -> Any:
        """Read a key that is not a field; refuse it unless the class accepts any keyword."""
        if target.open and isinstance(key, str) and key.isidentifier() and not key.startswith("_"):
            return self.read_value(value, ANYTHING)
        hint = ""
        if isinstance(key, str):
            became = describe_change(target, key)
            hint = f": it {became}" if became else self._suggest_name(key, target.fields)
            hint = hint or self._suggest_name(key, inner, prefix=f"{target.embeds}.")
        raise make_error(f"unknown key of {target.short_name}{hint}")

    def _find_embedded_fields(self, data: dict[str, Any], target: Target) -> frozenset[str]:
        """Return the fields that the config in `target.embeds` owns."""
        assert target.embeds is not None
        value = data.get(target.embeds)
        try:
            if isinstance(value, dict):
                return self.find_config_class(value, target.fields[target.embeds].type).field_names
        except ReadError:
            pass
        return frozenset(getattr(type(value), "__dataclass_fields__", ()))


def _get_plan(data: dict[str, Any], target: Target, *, is_document: bool) -> Plan:
    """Return how to read mappings of the shape of `data`, from the cache or made now."""
    shape = get_shape("document" if is_document else "config", data)
    plan: Plan | None = target.shapes.get(shape)
    if plan is None:
        plan = make_plan(data, target, is_document=is_document)
        if not plan.unknown:  # unknown keys come from the document, which may have a million of them
            cache_shape(target, shape, plan)
    return plan


def check_file_fields(data: dict[str, Any], target: Target) -> ProblemList:
    """Check that no field makes the constructor open a file."""
    found: ProblemList = []
    for name, content in target.files.items():
        if not data.get(content):
            message = f"documents cannot name files to read: give the file's content as {content}"
            found.append(((name,), message) if name in data else ((content,), "required, but missing"))
    return found
