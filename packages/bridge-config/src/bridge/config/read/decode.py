"""Decodes documents into configurations, or checks them; reports all problems at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bridge.config.errors import ConfigError, DocumentError, OmittedWarning, Problem, TargetError, warn
from bridge.config.foreign.recognize import convert_foreign, is_huggingface
from bridge.config.migration import Migration
from bridge.config.paths import Path, format_path, parse_path
from bridge.config.problems import MAX_PROBLEMS, ProblemList, ReadError, describe_value, make_error, prefix_path
from bridge.config.read.build import build
from bridge.config.read.generation import check_settings
from bridge.config.read.lookup import LiveLookup, Lookup, TableLookup, check_builder
from bridge.config.read.migrate import migrate
from bridge.config.read.reader import Reader
from bridge.config.schema.annotations import Instance
from bridge.config.schema.names import GENERATION_CONFIG, MODEL_CONFIG
from bridge.config.schema.registry import get_document_name
from bridge.config.schema.table import get_shipped
from bridge.config.schema.target import Target
from bridge.config.schema.values import ParsedConfig


def decode_config[ConfigT](data: object, cls: type[ConfigT]) -> ConfigT:
    """Return the configuration that the document `data` describes.

    Args:
        data: plain data with the class name under `_target_`. It may also hold live values (a dtype, a function).
        cls: the class that the result must be an instance of.

    Raises:
        DocumentError: lists all that is wrong with `data`.
    """
    config: ConfigT
    present, wanted = migrate_document(data, lookup := LiveLookup()), Instance(get_document_name(cls) or "", cls)
    config, builder = _read(present, wanted, lookup, make=build)
    for note in present.steps[0].notes:  # what a Megatron Bridge document says that could not be converted
        warn(note, OmittedWarning)
    if builder is not None and builder != getattr(config, "builder", None):
        object.__setattr__(config, "builder", builder)
    return config


@dataclass(frozen=True)
class Checked:
    """A valid document, read without constructing its configuration."""

    parsed: ParsedConfig
    builder: str | None
    """The builder that builds it."""

    present: CurrentDocument
    """The document in the current form."""


def check(data: object, *, defaults: bool = False) -> Checked:
    """Check the document `data` against the shipped table, without constructing anything.

    Args:
        data: plain data with the class's name under `_target_`.
        defaults: whether to fill in the defaults of missing fields.

    Raises:
        DocumentError: lists all that is wrong with `data`.
    """
    present = migrate_document(data, lookup := TableLookup())
    parsed, builder = _read(present, Instance(MODEL_CONFIG), lookup, make=_identity, defaults=defaults)
    return Checked(parsed, builder or parsed.target.builder, present)


@dataclass(frozen=True)
class CurrentDocument:
    """A document in the current form, with the original."""

    given: Any
    """The original document."""

    data: Any
    steps: tuple[Migration, ...]
    """The migrations from the original document to this one, in order."""

    @property
    def notes(self) -> list[str]:
        """What the migrations did, one line each."""
        return [note for step in self.steps for note in step.notes]

    @property
    def problems(self) -> list[Problem]:
        """What could not be migrated, by its path in the original document."""
        found: list[Problem] = []
        for number, step in enumerate(self.steps):
            before = self.steps[:number]
            found += [
                Problem(format_path(find_original_path(path, before)), message) for path, message in step.problems
            ]
        return found

    def find_origin(self, path: Path) -> Path:
        """Return where the value at `path` stands in the original document."""
        return find_original_path(path, self.steps)


def _identity(parsed: ParsedConfig) -> ParsedConfig:
    return parsed


def migrate_document(data: object, lookup: Lookup) -> CurrentDocument:
    """Convert a document of another system or of an older version to the current form."""

    def target_of(name: str) -> Target | None:
        if name == GENERATION_CONFIG:
            return get_shipped(name)  # avoids importing transformers
        try:
            return lookup.find_by_name(name, suggest=False)
        except TargetError:
            return None

    try:
        foreign = convert_foreign(data)
        own = migrate(foreign.data, target_of)
        return CurrentDocument(data, own.data, (foreign, own))
    except RecursionError:
        raise DocumentError([Problem("$", "nested too deeply")]) from None


def find_original_path(path: Path, steps: tuple[Migration, ...]) -> Path:
    """Return where the value at `path` stood before `steps`."""
    for step in reversed(steps):
        came_from = dict(step.moves)
        for length in range(len(path), -1, -1):
            if path[:length] in came_from:
                path = came_from[path[:length]] + path[length:]
                break
    return path


def _read[T](
    present: CurrentDocument,
    wanted: Instance,
    lookup: Lookup,
    *,
    make: Callable[[ParsedConfig], T],
    defaults: bool = False,
) -> tuple[T, str | None]:
    """Read `present`; return the result of `make`, and the builder that the document names."""
    found: ProblemList = []
    problems, cause = present.problems, None
    try:
        described, builder = _read_document(present.data, wanted, lookup, defaults=defaults)
        parsed = make(described)
    except ReadError as error:
        found, cause = error.problems, error.__cause__
    except TargetError as error:  # a class in an annotation cannot be described
        found = [((), str(error))]
    except RecursionError:
        found = [((), "nested too deeply")]
    more = len(problems) + len(found) - MAX_PROBLEMS
    problems += [Problem(format_path(present.find_origin(path)), message) for path, message in found[:MAX_PROBLEMS]]
    if more > 0:
        problems[MAX_PROBLEMS:] = [Problem("$", f"{more:,} more problems")]
    if problems:
        raise DocumentError(problems) from cause
    return parsed, builder


def _read_document(
    data: object, wanted: Instance, lookup: Lookup, *, defaults: bool
) -> tuple[ParsedConfig, str | None]:
    if not isinstance(data, dict):
        raise make_error(
            f"expected a mapping that describes a {wanted.name.rpartition('.')[2]}, got {describe_value(data)}"
        )
    if "_target_" not in data:
        if is_huggingface(data):
            raise make_error(
                "missing '_target_': this is a config.json of Hugging Face, which `bridge from-hf` converts"
            )
        raise make_error(
            "missing '_target_': give the name of the config class, such as 'bridge.models.gpt.GPTModelConfig'"
        )
    omissions = data.get("_omitted_", [])
    found = _check_omissions(omissions)
    reader = Reader(lookup, {} if found else _find_omitted_fields(omissions, data), defaults=defaults)
    try:
        target = _read_class(data["_target_"], wanted, reader)
    except ReadError as error:
        raise ReadError(error.problems + found) from error.__cause__
    try:
        builder = _read_builder(data.get("_builder_"), target, lookup)
    except ReadError as error:
        found += error.problems
    try:
        parsed = reader.read_config(data, target, is_document=True)
    except ReadError as error:
        raise ReadError(error.problems + found) from error.__cause__
    found += check_settings(data, target)
    if found:
        raise ReadError(found)
    return parsed, builder


def _read_class(name: object, wanted: Instance, reader: Reader) -> Target:
    with prefix_path("_target_"):
        target = reader.resolve_class(name, (wanted,))
        if target.name == MODEL_CONFIG:
            raise make_error(f"{target.name} is the abstract base: name a class derived from it")
        return target


def _read_builder(name: object, target: Target, lookup: Lookup) -> str | None:
    """Return the builder that a document names, if it is not the default of its class."""
    if name is None or name == target.builder:
        return None
    with prefix_path("_builder_"):
        if not isinstance(name, str):
            raise make_error(f"expected the name of a ModelBuilder, got {describe_value(name)}")
        try:
            check_builder(name, target, lookup)
        except TargetError as error:
            raise make_error(str(error)) from error
    return name


_MAX_REASON = 1000  # characters


def _check_omissions(entries: object) -> ProblemList:
    """Check the form of `_omitted_`."""
    if not isinstance(entries, list):
        return [(("_omitted_",), f"expected a list of {{path: ..., reason: ...}}, got {describe_value(entries)}")]
    found: ProblemList = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or entry.keys() != {"path", "reason"}:
            found.append((("_omitted_", i), "expected {path: ..., reason: ...}"))
            continue
        path, reason = entry["path"], entry["reason"]
        if not _is_path(path):
            message = f"expected a path such as '$.transformer.init_method', got {describe_value(path)}"
            found.append((("_omitted_", i, "path"), message))
        if not isinstance(reason, str) or not reason.isprintable() or len(reason) > _MAX_REASON:
            message = f"expected one line of at most {_MAX_REASON:,} characters, got {describe_value(reason)}"
            found.append((("_omitted_", i, "reason"), message))
    return found


def _is_path(text: object) -> bool:
    try:
        return isinstance(text, str) and bool(parse_path(text))
    except ConfigError:
        return False


def _find_omitted_fields(entries: list[dict[str, str]], data: dict[str, Any]) -> dict[int, set[str]]:
    """Return the fields that `_omitted_` lists, by the id of the mapping that lacks them."""
    fields: dict[int, set[str]] = {}
    for entry in entries:
        _add_missing_key(fields, data, entry["path"])
    if entries:
        what = "; ".join(
            f"{format_path(parse_path(entry['path']))} ({entry['reason']})" for entry in entries[:MAX_PROBLEMS]
        )
        more = f" and {len(entries) - MAX_PROBLEMS:,} more" if len(entries) > MAX_PROBLEMS else ""
        message = f"the document was written without {what}{more}: defaults are used"
        warn(message, OmittedWarning)
    return fields


def _add_missing_key(fields: dict[int, set[str]], data: dict[str, Any], path: str) -> None:
    """Add to `fields` the first key of `path` that `data` lacks."""
    node: Any = data
    for key in parse_path(path):
        if isinstance(node, dict) and isinstance(key, str) and key not in node:
            fields.setdefault(id(node), set()).add(key)
            return
        try:
            node = node[key]
        except (KeyError, IndexError, TypeError):
            return
