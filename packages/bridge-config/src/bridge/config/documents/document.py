"""Document: a configuration as plain data, with the source of each value."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Self

from bridge.config.documents.access import copy_data, get_value, remove_value, set_value
from bridge.config.documents.folders import find_folder_reader, is_folder
from bridge.config.documents.hub_cache import resolve_repository
from bridge.config.documents.overrides import describe_override, split_override
from bridge.config.documents.provenance import Provenance
from bridge.config.documents.saving import add_schema_line, write_file, write_schema_beside
from bridge.config.documents.sources import (
    STANDARD_INPUT,
    SUFFIXES,
    check_name,
    is_preset,
    make_source_error,
    read_source,
)
from bridge.config.errors import ConfigError, DocumentError, Problem, quote_name
from bridge.config.model import ModelConfig
from bridge.config.paths import Path, format_path, parse_path
from bridge.config.problems import describe_value
from bridge.config.text.dump import dump_json, dump_yaml
from bridge.config.text.edit import edit_text
from bridge.config.text.limits import MAX_DEPTH
from bridge.config.text.parse import ParsedText, parse_json, parse_yaml

# `bridge --help` and `bridge show` need this module, but not the modules that check documents. Those take 30 ms to
# import, as long as all others together, so the methods that need them import them.
if TYPE_CHECKING:
    from bridge.config.compare import Difference
    from bridge.config.read.decode import Checked


@dataclass
class Document:
    """A configuration as plain data. No class of the configuration needs to be installed."""

    data: dict[str, Any]
    source: str = ""
    """The file, preset or folder that the data came from; empty if there is none."""

    notes: list[str] = field(default_factory=list, compare=False)
    """What the user should know about the conversion of a folder."""

    _provenance: Provenance = field(default_factory=Provenance, repr=False, compare=False)
    _is_converted: bool = field(default=False, repr=False, compare=False)
    """True if `migrate` converted a document of another system, whose file has other sections than the model."""

    @classmethod
    def load(cls, source: str | FilePath, overrides: Sequence[str] = ()) -> Self:
        """Load a document from a `.yaml`, `.yml` or `.json` file, a preset, a folder, or standard input.

        Args:
            source: A file, the name of a preset, a folder that an installed distribution reads (with bridge-models:
                of Hugging Face), a repository in the Hugging Face cache (`org/name`), or `-` for standard input (YAML
                or JSON).
            overrides: Applied in order: `path=value` sets a value, written in YAML, and `~path` removes one.

        Raises:
            DocumentError: the source cannot be read or is not a mapping, or an override is malformed or does not apply.
        """
        source = resolve_repository(str(source))
        if is_folder(source):
            converted: Document = find_folder_reader(source)(source)
            document = cls(converted.data, source, converted.notes)
            document.override(overrides)
            return document
        found = _parse(read_source(source), source)
        if not isinstance(found.data, dict):
            raise make_source_error(source, f"expected a mapping at the top, got {describe_value(found.data)}")
        document = cls.from_text(found, source)
        if overrides:
            document.override(overrides)
        return document

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """Return the document of a configuration."""
        return cls(config.as_dict())

    @classmethod
    def from_text(cls, text: ParsedText, source: str) -> Self:
        """Return the document of a parsed text, a mapping that was read from `source`."""
        return cls(text.data, source, _provenance=Provenance(text))

    def get(self, path: str) -> Any:
        """Return the value at a dotted path such as `transformer.num_layers` or `blocks[0].size`.

        Raises:
            ConfigError: there is no value.
        """
        return get_value(self.data, parse_path(path))

    def set(self, path: str, value: Any) -> None:
        """Set the value at a dotted path. Missing mappings are created.

        Raises:
            ConfigError: the path leads through a value that is not a mapping, or past the end of a list.
        """
        steps = _parse_inner_path(path)
        set_value(self.data, steps, value)
        self._provenance.record_set(steps, self.source)  # without a line: the text does not have this value

    def remove(self, path: str) -> None:
        """Remove the value at a dotted path.

        Raises:
            ConfigError: there is no value.
        """
        steps = _parse_inner_path(path)
        remove_value(self.data, steps)
        self._provenance.record_removal(steps, self.source)

    def override(self, overrides: Sequence[str]) -> None:
        """Apply overrides in order: `path=value` (the value is YAML; `+path=value` is the same) and `~path`.

        In a document of another system, such as a `run_config.yaml`, a path that does not begin with one of its
        sections is a path in the converted model.

        Raises:
            DocumentError: lists all overrides that are malformed or do not apply. None is applied then.
        """
        if isinstance(overrides, str):
            raise ConfigError(f"expected a list of overrides, got a string: write [{overrides!r}]")
        try:
            data = copy_data(self.data)  # the document changes only if all overrides apply
        except RecursionError:
            raise make_source_error(self.source, "nested too deeply") from None
        changed = replace(self, data=data, _provenance=self._provenance.copy())
        problems = []
        for text in overrides:
            try:
                changed._override(text)
            except DocumentError as error:
                problems += error.problems
            except ConfigError as error:
                problems.append(Problem("$", str(error), describe_override(text)))
        if problems:
            raise DocumentError(problems)
        self.data, self._provenance = changed.data, changed._provenance

    def config(self) -> ModelConfig:
        """Create the configuration that the document describes.

        Raises:
            DocumentError: lists every problem with file, line and column.
        """
        from bridge.config.read.decode import decode_config

        with self.locate_problems():
            return decode_config(self.data, ModelConfig)

    def check(self, *, defaults: bool = False) -> Checked:
        """Check the document against the shipped table, without importing or creating any class.

        Args:
            defaults: Add the defaults of fields that the document leaves out to the result.

        Raises:
            DocumentError: lists every problem with file, line and column.
        """
        from bridge.config.read.decode import check

        with self.locate_problems():
            return check(self.data, defaults=defaults)

    def fingerprint(self) -> str:
        """Return the fingerprint of the document's contents, see `bridge.config.canonical.fingerprint`.

        Raises:
            DocumentError: lists every problem with file, line and column.
        """
        from bridge.config.canonical import fingerprint

        with self.locate_problems():
            return fingerprint(self.data)

    def diff(self, other: Document, *, defaults: bool = True) -> list[Difference]:
        """Return the differences of `other` from this document, field by field.

        Args:
            other: The document to compare with.
            defaults: Count a field that is left out as set to its default.

        Raises:
            DocumentError: one of the documents has problems.
        """
        from bridge.config.compare import find_differences

        return list(find_differences(self.check(defaults=defaults), other.check(defaults=defaults)))

    def migrate(self) -> list[str]:
        """Convert the document to Bridge's current form; return notes about the changes, those of a folder first.

        Raises:
            DocumentError: the document cannot be converted; lists every problem with file, line and column.
        """
        from bridge.config.read.decode import migrate_document
        from bridge.config.read.lookup import TableLookup

        with self.locate_problems():
            present = migrate_document(self.data, TableLookup())
            if present.problems:
                raise DocumentError(present.problems)
        self._is_converted |= present.steps[0].data is not self.data
        if present.data is not self.data:
            self._provenance.record_migration(present.steps)
            self.data = present.data
        notes, self.notes = [*self.notes, *present.notes], []
        return notes

    @contextlib.contextmanager
    def locate_problems(self) -> Iterator[None]:
        """Add file, line and column to the problems of a DocumentError raised inside."""
        try:
            yield
        except DocumentError as error:
            raise DocumentError(self._provenance.locate(error.problems, self.source)) from error.__cause__

    def to_yaml(self) -> str:
        """Return the document as YAML. If it was loaded from YAML, that text changes only where the data changed.

        Raises:
            ConfigError: the layout of the text does not allow the change, or YAML cannot express the data.
        """
        self._check_top()
        if (text := self._get_yaml_text()) is None:
            return dump_yaml(self.data)
        return edit_text(text, self.data, self._provenance.dropped)

    def to_json(self) -> str:
        """Return the document as JSON.

        Raises:
            ConfigError: JSON cannot express the data.
        """
        self._check_top()
        return dump_json(self.data)

    def _get_yaml_text(self) -> ParsedText | None:
        """Return the YAML text that the document was loaded from, or None."""
        text = self._provenance.text
        return text if text is not None and text.kind == "yaml" else None

    def _check_top(self) -> None:
        if not isinstance(self.data, dict):
            raise ConfigError(f"expected a mapping at the top of the document, got {describe_value(self.data)}")

    def save(self, path: str | FilePath | None = None) -> None:
        """Write the document to a `.yaml`, `.yml` or `.json` file, which becomes the source of the document.

        The file is replaced atomically. YAML keeps the comments of the text that the document was loaded from. A new
        YAML file names its JSON Schema for editors, and the schema is written beside it unless the file exists.

        Args:
            path: The file to write. By default, the file that the document was loaded from.

        Raises:
            ConfigError: there is no file to write to, it cannot be written, or the format cannot express the data.
        """
        file = self._get_own_file() if path is None else FilePath(path)
        check_name(str(file))
        if file.suffix not in SUFFIXES:
            raise ConfigError(f"{file}: expected a .yaml, .yml or .json file, got {file.suffix!r}")
        is_json, is_own = file.suffix == ".json", str(file) == self.source and self._get_yaml_text() is not None
        text = self.to_json() + "\n" if is_json else self.to_yaml()
        if not (is_json or is_own):
            text = add_schema_line(text, self.data.get("_target_"))
        saved = _parse(text, str(file))  # before writing: an error here must not leave a changed file
        write_file(file, text)
        self.source, self._provenance, self._is_converted = str(file), Provenance(saved), False
        if not is_json:
            write_schema_beside(file, saved.text, self.data.get("_target_"))

    def _get_own_file(self) -> FilePath:
        """Return the file that the document was loaded from, if it can be overwritten."""
        if not self.source:
            raise ConfigError("this document was not loaded from a file: give a path to save it to")
        if self.source == STANDARD_INPUT:
            raise ConfigError("this document was read from standard input: give a path to save it to")
        if is_folder(self.source):
            raise ConfigError(f"{self.source} is a folder: give a path to save the document to")
        if is_preset(self.source):
            raise ConfigError(
                f"{self.source!r} is a preset, which cannot be changed: give a path to save the document to"
            )
        if self._is_converted:
            raise ConfigError(
                f"{self.source}: the file has other sections, which saving would drop: save to a new file"
            )
        return FilePath(self.source)

    def _override(self, text: str) -> None:
        """Apply one override."""
        named, value = split_override(text)
        path = self._resolve_path(named)
        if value is None:
            self.remove(format_path(path))
            return
        origin = describe_override(text)
        self.set(format_path(path), parse_yaml(value, origin).data)
        self._provenance.record_set(path, origin)

    def _resolve_path(self, text: str) -> Path:
        """Return the path of an override, which in another system's document may be a path in the converted model."""
        from bridge.config.foreign.recognize import convert_foreign
        from bridge.config.read.decode import CurrentDocument

        path = _parse_inner_path(text)
        if path[0] in self.data:
            return path
        try:
            step = convert_foreign(self.data)
        except DocumentError:  # the model is unknown: reading the document reports it
            return path
        return CurrentDocument(self.data, step.data, (step,)).find_origin(path)


def load_config(source: str | FilePath, overrides: Sequence[str] = ()) -> ModelConfig:
    """Load a configuration from a file or preset, with overrides; see `Document.load` and `Document.config`.

    Raises:
        DocumentError: the source cannot be read, or the document has problems; lists every problem.
    """
    return Document.load(source, overrides).config()


def _parse_inner_path(text: str) -> Path:
    """Parse the path of a value that is set or removed, which is not the whole document."""
    path = parse_path(text)
    if not path:
        raise ConfigError(f"{text!r} is the whole document: give a path inside it")
    if len(path) > MAX_DEPTH:
        raise ConfigError(f"{quote_name(text)} leads more than {MAX_DEPTH} levels deep")
    return path


def _parse(text: str, source: str) -> ParsedText:
    if source == STANDARD_INPUT and text.startswith("{"):
        with contextlib.suppress(DocumentError):  # a YAML mapping can also start with a brace
            return parse_json(text, source)
    return parse_json(text, source) if source.endswith(".json") else parse_yaml(text, source)
