"""Documents as text: YAML 1.2 (its core schema, and nothing beside it) and JSON, with the position of every value.

Text is bounded in size, depth and number of values before anything is made of it.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter

from bridge.config.errors import DocumentError, Problem
from bridge.config.paths import Path, shown

MAX_BYTES = 10 * 2**20
MAX_DEPTH = 100
MAX_VALUES = 100_000

Position = tuple[int, int]

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass
class Parsed:
    """Plain data, and the line and column (from 1) where each key or item of it stands."""

    data: Any = None
    positions: dict[Path, Position] = field(default_factory=dict)


def parse_yaml(text: str, file: str | None = None) -> Parsed:
    """The data of a YAML text.

    Raises:
        DocumentError: it is not YAML, has duplicate keys or tags, or is out of bounds.
    """
    _check_size(text, file)
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Composer
    try:
        node = yaml.compose(text)
    except MarkedYAMLError as error:
        said = " ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (None, None)
        raise DocumentError([Problem("$", f"not YAML: {said}", file, line, column)]) from error
    except (YAMLError, ValueError) as error:
        raise DocumentError([Problem("$", f"not YAML: {error}", file)]) from error
    builder = _Builder(file, yaml.resolver)
    parsed = Parsed(builder.value(node, ()) if node is not None else None, builder.positions)
    if builder.problems:
        raise DocumentError(builder.problems)
    return parsed


def parse_json(text: str, file: str | None = None) -> Parsed:
    """The data of a JSON text. Without positions: they are looked for, by `parse_yaml`, when there is a problem.

    Raises:
        DocumentError: it is not JSON, has duplicate keys or NaN, or is out of bounds.
    """
    _check_size(text, file)
    try:
        return Parsed(json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant))
    except json.JSONDecodeError as error:
        raise DocumentError([Problem("$", f"not JSON: {error.msg}", file, error.lineno, error.colno)]) from error
    except ValueError as error:
        parse_yaml(text, file)  # the same text as YAML has the same duplicate keys, and says where
        raise DocumentError([Problem("$", f"not acceptable JSON: {error}", file)]) from error
    except RecursionError:
        raise DocumentError([Problem("$", "nested too deeply", file)]) from None


def dump_yaml(data: Any) -> str:
    """Plain data as YAML text that `parse_yaml` reads back equal."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = 120
    yaml.representer.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue().removesuffix("...\n")


def dump_json(data: Any) -> str:
    """Plain data as indented JSON text."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)


class _Representer(SafeRepresenter):
    """Ruamel's representer, without aliases for what stands in two places."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> Any:
        # Ruamel 0.19 writes some line separators bare, and reads them back as spaces.
        style = None if text.replace("\n", "").isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Representer.add_representer(str, _Representer.represent_text)


class _Composer(Composer):
    """Ruamel's composer, stopped at a depth at which no configuration lives."""

    _depth = 0

    def compose_node(self, parent: Any, index: int) -> Any:
        if self._depth > MAX_DEPTH:
            mark = self.parser.peek_event().start_mark
            raise MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Builder:
    """Makes plain data of YAML nodes, and collects all that is wrong with them."""

    def __init__(self, file: str | None, resolver: Any) -> None:
        self.file = file
        self._resolver = resolver
        self.positions: dict[Path, Position] = {}
        self.problems: list[Problem] = []
        self._count = 0

    def value(self, node: Node, path: Path) -> Any:
        self.positions.setdefault(path, _position(node))
        self._count += 1
        # An alias stands for a copy of its anchor: few lines can mean endless data.
        if self._count > MAX_VALUES or len(path) > MAX_DEPTH:
            what = f"nested more than {MAX_DEPTH} deep" if len(path) > MAX_DEPTH else f"more than {MAX_VALUES} values"
            raise DocumentError([self._problem(what, node, path)])
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            self._check_tag(node, path)
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self._scalar(node, path)

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        self._check_tag(node, path)
        made: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node, path) if isinstance(key_node, ScalarNode) else None
            if not isinstance(key, str):
                self.problems.append(self._problem("keys must be text: quote this one", key_node, path))
                continue
            if key in made:
                self.problems.append(self._problem("duplicate key", key_node, (*path, key)))
                continue
            self.positions[*path, key] = _position(key_node)
            made[key] = self.value(value_node, (*path, key))
        return made

    def _scalar(self, node: ScalarNode, path: Path) -> Any:
        self._check_tag(node, path)
        if node.style:
            return node.value
        try:
            return _core(node.value)
        except ValueError as error:
            self.problems.append(self._problem(str(error), node, path))
            return None

    def _check_tag(self, node: Node, path: Path) -> None:
        """Refuse a tag that says more than the text: plain data needs none, and others would be code."""
        implicit = self._resolver.resolve(type(node), node.value, (getattr(node, "style", None) is None, True))
        if str(node.tag) != str(implicit):
            tag = str(node.tag).replace("tag:yaml.org,2002:", "!!")
            self.problems.append(self._problem(f"the tag {tag} is not allowed: write plain data", node, path))

    def _problem(self, message: str, node: Node, path: Path) -> Problem:
        return Problem(shown(path), message, self.file, *_position(node))


def _core(text: str) -> Any:
    """A plain scalar by YAML 1.2's core schema."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if len(text) > 1000:
        return text  # no number is that long
    if _INTEGER.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if re.fullmatch(r"[-+]?0[0-9_]+", text):
        raise ValueError(f"{text} may be an octal number, a decimal one or text: drop the zero, write 0o, or quote it")
    if _FLOAT.fullmatch(text):
        return float(text)
    if infinity := _INFINITY.fullmatch(text):
        return float(infinity[1] + "inf")
    if text in (".nan", ".NaN", ".NAN"):
        raise ValueError("not a number is not a value")
    return text


def _position(node: Node) -> Position:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _check_size(text: str, file: str | None) -> None:
    if len(text) > MAX_BYTES:
        raise DocumentError([Problem("$", f"larger than {MAX_BYTES // 2**20} MiB", file)])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return made


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
