"""Documents: plain data with a memory of where each value came from."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Self

from bridge.config.documents.presets import preset, presets
from bridge.config.errors import ConfigError, DocumentError, Problem, TargetError, closest, nearest
from bridge.config.model import ModelConfig
from bridge.config.paths import Path, parsed, shown
from bridge.config.problems import got
from bridge.config.text.dump import dump_json, dump_yaml
from bridge.config.text.limits import MAX_BYTES
from bridge.config.text.nodes import Node
from bridge.config.text.parse import BYTE_ORDER_MARK, Parsed, parse_json, parse_yaml

if TYPE_CHECKING:
    from bridge.config.compare import Difference
    from bridge.config.read.decode import Checked
    from bridge.config.rewrite import Migrated

STANDARD_INPUT = "-"
"""What stands for standard input where a file is asked for."""

_CHUNK = 2**16
_YAML_SUFFIXES = (".yaml", ".yml")
_MODELINE = re.compile(r"^\ufeff?#\s*yaml-language-server:(?:\s*\$schema=(?P<schema>\S+))?", re.MULTILINE)
_SUFFIXES = (*_YAML_SUFFIXES, ".json")
_PATH = r'[A-Za-z_$](?:[^=\s"]|"(?:[^"\\]|\\.)*")*'
_FORGOTTEN_EQUALS = re.compile(r"(?P<path>[A-Za-z_$][\w.\[\]]*)(?:[:\s]\s*(?P<value>.*))?", re.DOTALL)
_OVERRIDE = re.compile(rf"\+{{0,2}}(?P<path>{_PATH})=(?P<value>.*)|~(?P<removed>{_PATH})", re.DOTALL)


@dataclass
class Document:
    """A configuration as plain data, before any class has seen it."""

    data: dict[str, Any]
    source: str = ""
    """The file or preset that the data came from; empty if from neither."""

    _parsed: Parsed | None = field(default=None, repr=False, compare=False)
    _origins: dict[Path, str] = field(default_factory=dict, repr=False, compare=False)
    _dropped: frozenset[Node] = field(default=frozenset(), repr=False, compare=False)
    """The removed items of lists: those after them have another index now than in the text."""

    _migrations: tuple[Migrated, ...] = field(default=(), repr=False, compare=False)
    """How the data came to stand elsewhere than in the text."""

    _given_origins: dict[Path, str] = field(default_factory=dict, repr=False, compare=False)
    """What `_origins` was before that, by the places in the text."""

    _is_adopted: bool = field(default=False, repr=False, compare=False)
    """Whether the data is what `migrate` made of a document of the reference, whose file says more than that."""

    @classmethod
    def load(cls, source: str | FilePath, overrides: Sequence[str] = ()) -> Self:
        """The document in a `.yaml`, `.yml` or `.json` file, or the preset of that name, or on standard input.

        Args:
            source: the file, or the preset's name, or `-` for standard input, which is YAML or JSON.
            overrides: `path=value` sets (the value is YAML), `~path` removes; in order.

        Raises:
            DocumentError: it cannot be read, is no mapping, or an override is malformed or does not apply.
        """
        source = str(source)
        found = _parse(_read(source), source)
        if not isinstance(found.data, dict):
            raise _failed(source, f"expected a mapping at the top, got {got(found.data)}")
        document = cls(found.data, source, found)
        if overrides:
            document.override(overrides)
        return document

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """The document that describes `config`."""
        return cls(config.as_dict())

    def get(self, path: str) -> Any:
        """The value at a dotted path such as `transformer.num_layers` or `blocks[0].size`.

        Raises:
            ConfigError: there is none.
        """
        node: Any = self.data
        for depth, key in enumerate(steps := parsed(path)):
            if not _has(node, key):
                known = [name for name in node if isinstance(name, str)] if isinstance(node, dict) else []
                raise ConfigError(f"{shown(steps[: depth + 1])} is not in the document{nearest(str(key), known)}")
            node = node[key]
        return node

    def set(self, path: str, value: Any) -> None:
        """Put `value` at a dotted path; mappings on the way are made where there are none.

        Raises:
            ConfigError: something on the way is neither a mapping nor a list that is long enough.
        """
        *before, last = steps = self._steps(path)
        node: Any = self.data
        for depth, key in enumerate(before):
            if isinstance(node, dict) and isinstance(key, str) and node.get(key) is None:
                node[key] = _nested(steps[depth + 1 :], value, shown(steps[: depth + 1]))
                break
            node = self._inside(node, key, path, depth)
        else:
            if not (isinstance(node, dict) and isinstance(last, str)):
                self._inside(node, last, path, len(before))
            node[last] = value
        self._forget(steps)
        self._origins[steps] = self.source  # no line of it has this value

    def remove(self, path: str) -> None:
        """Remove the value at a dotted path.

        Raises:
            ConfigError: there is none.
        """
        self.get(path)
        *before, last = steps = self._steps(path)
        node: Any = self.data
        for key in before:
            node = node[key]
        if isinstance(last, int):
            self._drop(steps)
        del node[last]
        self._forget(steps)
        if isinstance(last, int):
            self._origins = {_without_item(at, steps): text for at, text in self._origins.items()}

    def override(self, overrides: Sequence[str]) -> None:
        """Apply overrides in order: `path=value` (the value is YAML; `+path=value` is the same) and `~path`.

        In a document of the reference, a path that begins with none of its sections leads into its model.

        Raises:
            DocumentError: lists those that are malformed or do not apply; then none is applied.
        """
        if isinstance(overrides, str):
            raise ConfigError(f"expected a list of overrides, got one text: write [{overrides!r}]")
        try:
            data = _copied(self.data)
        except RecursionError:
            raise _failed(self.source, "nested too deeply") from None
        changed = replace(self, data=data, _origins=dict(self._origins))
        problems = []
        for text in overrides:
            try:
                changed._override(text)
            except DocumentError as error:
                problems += error.problems
            except ConfigError as error:
                problems.append(Problem("$", str(error), _called(text)))
        if problems:
            raise DocumentError(problems)
        self.data, self._origins, self._dropped = changed.data, changed._origins, changed._dropped

    def config(self) -> ModelConfig:
        """The configuration that the document describes.

        Raises:
            DocumentError: it describes none; every problem with the file, line and column of its value.
        """
        from bridge.config.read.decode import decode_config

        with self.placing_problems():
            return decode_config(self.data, ModelConfig)

    def check(self, *, defaults: bool = False) -> Checked:
        """Check the document against the shipped descriptions: no class is needed, and none is made.

        Args:
            defaults: whether the result has the defaults of fields that the document leaves out.

        Raises:
            DocumentError: it describes no configuration; every problem with the file, line and column of its value.
        """
        from bridge.config.read.decode import check

        with self.placing_problems():
            return check(self.data, defaults=defaults)

    def fingerprint(self) -> str:
        """The fingerprint of what the document says, see `bridge.config.canonical.fingerprint`.

        Raises:
            DocumentError: it describes no configuration; every problem with the file, line and column of its value.
        """
        from bridge.config.canonical import fingerprint

        with self.placing_problems():
            return fingerprint(self.data)

    def diff(self, other: Document, *, defaults: bool = True) -> list[Difference]:
        """What differs in `other`, field by field.

        Args:
            other: the document to compare with.
            defaults: whether a field that is left out counts as given with its default.

        Raises:
            DocumentError: one of them describes no configuration.
        """
        from bridge.config.compare import differences

        return list(differences(self.check(defaults=defaults), other.check(defaults=defaults)))

    def migrate(self) -> list[str]:
        """Bring the document into the present form: of this version, and Bridge's own. Returns what was done.

        Raises:
            DocumentError: it has no such form; every problem with the file, line and column of its value.
        """
        from bridge.config.read.decode import current
        from bridge.config.read.lookup import TableLookup

        with self.placing_problems():
            present = current(self.data, Tables())
            if present.problems:
                raise DocumentError(present.problems)
        self._is_adopted |= present.steps[0].data is not self.data
        if present.data is not self.data:
            self._given_origins |= {self._in_text(at): text for at, text in self._origins.items()}
            self._migrations += present.steps
            self.data, self._origins = present.data, {}
        return present.notes

    @contextlib.contextmanager
    def placing_problems(self) -> Iterator[None]:
        """Add file, line and column to the problems that a reader of the data finds inside."""
        try:
            yield
        except DocumentError as error:
            raise DocumentError(self._located(error.problems)) from error.__cause__

    def to_yaml(self) -> str:
        """The document as YAML text: what it was loaded from, if that was YAML, changed only where the data changed.

        Raises:
            ConfigError: the text cannot be changed so, or YAML cannot say the data.
        """
        self._check_top()
        if self._parsed is None or self._parsed.kind != "yaml":
            return dump_yaml(self.data)
        from bridge.config.text.edit import edited

        return edited(self._parsed, self.data, self._dropped)

    def to_json(self) -> str:
        """The document as JSON text.

        Raises:
            ConfigError: JSON cannot say the data.
        """
        self._check_top()
        return dump_json(self.data)

    def _check_top(self) -> None:
        if not isinstance(self.data, dict):
            raise ConfigError(f"a document is a mapping at the top, not {got(self.data)}")

    def save(self, path: str | FilePath | None = None) -> None:
        """Write the document to a `.yaml`, `.yml` or `.json` file, whole or not at all; from then on it is that file's.

        YAML text that the document was loaded from keeps its comments. A new YAML file names its JSON Schema for
        editors, and a schema that is named so is put beside its file unless it is there.

        Args:
            path: the file; without it, the file that the document was loaded from.

        Raises:
            ConfigError: there is no such file, or it cannot be written, or the data has no such text.
        """
        file = self._own_file() if path is None else FilePath(path)
        _check_name(str(file))
        if file.suffix not in _SUFFIXES:
            raise ConfigError(f"{file}: a document is a .yaml, .yml or .json file, not {file.suffix!r}")
        is_json = file.suffix == ".json"
        text = self.to_json() + "\n" if is_json else self._naming_schema(self.to_yaml(), file)
        parsed_text = _parse(text, str(file))
        _write(file, text)
        self.source = str(file)
        self._parsed, self._origins, self._dropped = parsed_text, {}, frozenset()
        self._migrations, self._given_origins, self._is_adopted = (), {}, False
        if not is_json:
            self._put_schema_beside(file)

    def _own_file(self) -> FilePath:
        """The file that the document was loaded from."""
        if not self.source:
            raise ConfigError("this document came from no file: say where to save it")
        if self.source == STANDARD_INPUT:
            raise ConfigError("this document came from standard input: say where to save it")
        if _is_preset(self.source):
            raise ConfigError(f"{self.source!r} is a preset, which stays as it is: say where to save the document")
        if self._is_adopted:
            raise ConfigError(f"{self.source}: the reference wrote more than the model here: save to a new file")
        return FilePath(self.source)

    def _naming_schema(self, text: str, file: FilePath) -> str:
        """The YAML `text` for `file`, with the line that names its JSON Schema if the file is new and there is one."""
        is_own = self._parsed is not None and self._parsed.kind == "yaml" and str(file) == self.source
        if is_own or _MODELINE.search(text) or self._schema() is None:
            return text
        mark = BYTE_ORDER_MARK if text.startswith(BYTE_ORDER_MARK) else ""
        end = "\r\n" if "\r\n" in text else "\n"
        return f"{mark}# yaml-language-server: $schema={self._schema_name()}{end}{text[len(mark) :]}"

    def _put_schema_beside(self, file: FilePath) -> None:
        """Put the JSON Schema that the text names beside it, unless it is there. Where else it may be is not looked."""
        assert self._parsed
        named = _MODELINE.search(self._parsed.text)
        beside = file.with_name(self._schema_name())
        if named and named["schema"] == beside.name and not beside.exists() and (schema := self._schema()) is not None:
            _write(beside, dump_json(schema) + "\n")

    def _schema(self) -> dict[str, Any] | None:
        """The JSON Schema of the document; None if there is none."""
        from bridge.config.schema.jsonschema import json_schema

        name = self.data.get("_target_")
        try:
            return json_schema(name) if isinstance(name, str) else None
        except TargetError:  # a class of the running program, say
            return None

    def _schema_name(self) -> str:
        """What the file of the document's JSON Schema is called."""
        return f"{str(self.data.get('_target_')).rpartition('.')[2]}.schema.json"

    def _override(self, text: str) -> None:
        match = _OVERRIDE.fullmatch(text)
        if match is None:
            if meant := meant_as_override(text):
                raise ConfigError(f"malformed: write {meant}, or ~path to remove")
            hint = " (one FILE at a time)" if FilePath(text).suffix in _SUFFIXES else ""
            raise ConfigError(f"malformed: write path=value, or ~path to remove{hint}")
        path = self._meant(match["removed"] or match["path"])
        if match["removed"]:
            self.remove(shown(path))
            return
        self.set(shown(path), parse_yaml(match["value"], _called(text)).data)
        self._origins[path] = _called(text)

    def _meant(self, text: str) -> Path:
        """The path that an override names; in one of the reference, what it names in the model's present form."""
        from bridge.config.foreign.recognize import adopted
        from bridge.config.read.decode import Current

        path = parsed(text)
        if not path or path[0] in self.data:
            return path
        try:
            step = adopted(self.data)
        except DocumentError:  # a model that is not known has no present form
            return path
        return Current(self.data, step.data, (step,)).origin(path)

    def _steps(self, path: str) -> Path:
        steps = parsed(path)
        if not steps:
            raise ConfigError(f"{path!r} names the whole document: name a place in it")
        return steps

    def _inside(self, node: Any, key: str | int, path: str, depth: int) -> Any:
        if not _has(node, key):
            where = shown(parsed(path)[:depth])
            size = f" of length {len(node)}" if isinstance(node, list) else ""
            raise ConfigError(f"{where} is {got(node)}{size}: there is no {key!r} in it")
        return node[key]

    def _forget(self, path: Path) -> None:
        """Forget which overrides the values at `path` and below came from: they have been replaced."""
        self._origins = {at: text for at, text in self._origins.items() if at[: len(path)] != path}

    def _located(self, problems: list[Problem]) -> list[Problem]:
        located = [self._locate(problem) for problem in problems]
        return sorted(located, key=lambda problem: (problem.line or 0, problem.column or 0))

    def _locate(self, problem: Problem) -> Problem:
        path = parsed(problem.path)
        if origin := _nearest(self._origins, path) or _nearest(self._given_origins, self._in_text(path)):
            return Problem(problem.path, problem.message, origin)
        nodes = self._nodes(path)
        if self._parsed is None or not nodes:
            return Problem(problem.path, problem.message, self.source or None)
        last = nodes[-1]
        place = self._parsed.places[last.key[0] if last.key else last.start]
        return Problem(problem.path, problem.message, self.source, *place)

    def _nodes(self, path: Path) -> list[Node]:
        """What stands in the text along a path, from the top on, as far as there is anything."""
        node = self._parsed.root if self._parsed else None
        found: list[Node] = []
        for step in (*self._in_text(path), None):
            if node is None:
                break
            found.append(node)
            inside = (node.alias or node).value
            if isinstance(inside, list):
                kept = [item for item in inside if item not in self._dropped] if self._dropped else inside
                node = kept[step] if isinstance(step, int) and step < len(kept) else None
            else:
                node = inside.get(step) if isinstance(inside, dict) else None
        return found

    def _drop(self, path: Path) -> None:
        """Note that the item at `path` is removed from its list. What an alias stands for stays."""
        nodes = self._nodes(path)
        if any(node.alias for node in nodes[:-1]):
            self._origins.setdefault(path[:-1], self.source)  # its items now have other indices than those in the text
        elif len(nodes) == len(path) + 1:
            self._dropped |= {nodes[-1]}

    def _in_text(self, path: Path) -> Path:
        """Where the value that is now at `path` stands in the text."""
        from bridge.config.read.decode import origin

        return origin(path, self._migrations) if self._migrations else path


def load_config(source: str | FilePath, overrides: Sequence[str] = ()) -> ModelConfig:
    """The configuration in a file or preset, with overrides applied; see `Document.load` and `Document.config`.

    Raises:
        DocumentError: it cannot be read, or describes no configuration; lists every problem.
    """
    return Document.load(source, overrides).config()


def is_override(text: str) -> bool:
    """Whether a command line argument is an override rather than a file."""
    return _OVERRIDE.fullmatch(text) is not None and not os.path.exists(text)


def is_source(text: str) -> bool:
    """Whether there is a file or a preset of this name, or it stands for standard input."""
    return text == STANDARD_INPUT or os.path.exists(text) or preset(text) is not None


def meant_as_override(text: str) -> str | None:
    """The override that a text without an equals sign may be meant as, such as `num_layers` or `num_layers:8`."""
    match = _FORGOTTEN_EQUALS.fullmatch(text)
    if match is None or FilePath(text).suffix in _SUFFIXES:
        return None
    return f"{match['path']}={match['value'] or 'VALUE'}"


def _called(override: str) -> str:
    return f"override {override!r}"


def _nearest(origins: dict[Path, str], path: Path) -> str | None:
    """Where the value at `path` came from: said for it, or for what it is in."""
    return next((origins[path[:length]] for length in range(len(path), -1, -1) if path[:length] in origins), None)


def _without_item(path: Path, gone: Path) -> Path:
    """`path` once the item at `gone` is removed from its list."""
    *above, index = gone
    depth = len(above)
    if len(path) > depth and path[:depth] == gone[:-1] and path[depth] > index:  # type: ignore[operator]  # both in a list
        return (*path[:depth], path[depth] - 1, *path[depth + 1 :])  # type: ignore[operator]
    return path


def _has(node: Any, key: str | int) -> bool:
    if isinstance(node, dict):
        return key in node
    return isinstance(node, list) and isinstance(key, int) and key < len(node)


def _nested(path: Path, value: Any, above: str) -> Any:
    """`value` inside the mappings that are on `path`, below `above`."""
    for key in reversed(path):
        if not isinstance(key, str):
            raise ConfigError(f"{above} is no list, or not in the document: give the whole list there")
        value = {key: value}
    return value


def _copied(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _copied(value) for key, value in data.items()}
    return [_copied(value) for value in data] if isinstance(data, list) else data


def _failed(source: str, message: str) -> DocumentError:
    return DocumentError([Problem("$", message, source)])


def _is_preset(source: str) -> bool:
    """Whether only a preset can be meant, or one is and no file of that name is there."""
    return FilePath(source).suffix not in _SUFFIXES or (not os.path.exists(source) and source in presets())


def _read(source: str) -> str:
    """The text of a file or preset."""
    _check_name(source)
    return _read_preset(source) if source != STANDARD_INPUT and _is_preset(source) else read_file(source)


def read_file(source: str) -> str:
    """The text of a file that somebody names, or of standard input if they name `-`.

    Raises:
        DocumentError: it cannot be read, is no regular file, too large, or not UTF-8.
    """
    _check_name(source)
    if source == STANDARD_INPUT:
        return _decoded(sys.stdin.buffer.read(MAX_BYTES + 1), source)
    try:
        if not stat.S_ISREG(os.stat(source).st_mode):  # a pipe or device may never end, or do things when opened
            raise _failed(source, "cannot be read: not a regular file")
        with open(source, "rb") as stream:
            chunks = iter(partial(stream.read, _CHUNK), b"")
            return _decoded(b"".join(islice(chunks, MAX_BYTES // _CHUNK + 1)), source)
    except FileNotFoundError as error:
        raise _failed(source, f"no such file{nearest_source(source)}") from error
    except OSError as error:
        raise _failed(source, f"cannot be read: {error.strerror or error}") from error


def nearest_source(source: str) -> str:
    """The end of a message about a source that is not there: the nearest document beside it, or preset, or nothing."""
    file = FilePath(source)
    try:
        entries = os.listdir(file.parent)
    except OSError:
        entries = []
    found = {os.path.splitext(entry)[0]: entry for entry in sorted(entries) if entry.endswith(_SUFFIXES)}
    if source == file.name:
        found |= {name: name for name in presets() if name not in found}
    close = closest(file.stem if file.suffix in _SUFFIXES else file.name, found)
    return f"; did you mean {source.removesuffix(file.name) + found[close]!r}?" if close is not None else ""


def _check_name(source: str) -> None:
    try:
        is_name = b"\0" not in os.fsencode(source)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise _failed(ascii(source), "no file can have this name")


def _read_preset(name: str) -> str:
    if (found := preset(name)) is not None:
        return _decoded(found.read_bytes(), name)
    if os.path.exists(name):
        raise _failed(name, "a document is a .yaml, .yml or .json file: give this one such a name")
    known = presets()
    near = nearest_source(name) or (f"; the presets are {', '.join(known)}" if known else "; no presets are installed")
    raise _failed(name, f"no such file, nor a preset of this name{near}")


def _decoded(raw: bytes, source: str) -> str:
    if len(raw) > MAX_BYTES:
        raise _failed(source, f"larger than {MAX_BYTES // 2**20} MiB")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _failed(source, f"is not UTF-8 text (byte {error.start})") from error


def _parse(text: str, source: str) -> Parsed:
    if source == STANDARD_INPUT and text.startswith("{"):
        with contextlib.suppress(DocumentError):  # a mapping of YAML may begin so too
            return parse_json(text, source)
    return parse_json(text, source) if source.endswith(".json") else parse_yaml(text, source)


def _write(file: FilePath, text: str) -> None:
    """Put `text` into a file: all of it or, where that fails, nothing."""
    target = FilePath(os.path.realpath(file))  # a link stays one
    if target.exists() and not target.is_file():
        raise ConfigError(f"{file} cannot be written: not a regular file")
    written = target.with_name(f".{target.name}.{os.urandom(4).hex()}")
    try:
        with written.open("xb") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
        if target.exists():
            shutil.copymode(target, written)
        written.replace(target)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            written.unlink()
