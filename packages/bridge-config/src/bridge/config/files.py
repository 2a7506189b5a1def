"""Documents as text: YAML 1.2 (its core schema, and nothing beside it) and JSON, with the place of every value.

Text is read as a stream and given up as soon as it is out of bounds: in size, depth or number of values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from bridge.config.errors import ConfigError, DocumentError, Problem
from bridge.config.paths import Path, shown
from bridge.config.problems import MAX_PROBLEMS, got

if TYPE_CHECKING:
    from yaml import Dumper, ScalarNode
    from yaml.representer import SafeRepresenter

MAX_BYTES = 10 * 2**20
MAX_DEPTH = 100
MAX_VALUES = 100_000
MAX_KEY = 1024  # characters; YAML's own limit for a key that is not announced by a question mark
MAX_DIGITS = 4300  # as Python's own limit: reading and writing numbers takes the square of their length
_TOO_LARGE = 10**MAX_DIGITS

Position = tuple[int, int]

BYTE_ORDER_MARK = "\ufeff"
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_UNPRINTABLE = re.compile("[^\t\n\r -~\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
_JSON_TOKEN = re.compile(rf"{_STRING}|[\[\]{{}}]|[^\s\[\]{{}},:]+")
_JSON_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


@dataclass(slots=True, eq=False)
class Node:
    """A value where it stands in a text. `start` and `end` count characters; a block collection ends with its last
    value, and a block scalar with the blank lines after it.
    """

    start: int
    end: int
    value: Any = None
    """A scalar, a `dict[str, Node]` or a `list[Node]`."""
    style: str = ""
    """How it is written: empty (plain, or a block collection), a quote, `|`, `>`, or `{` (any flow collection)."""
    anchored: bool = False
    alias: Node | None = None
    """What it stands for, if it is an alias."""
    key: tuple[int, int] | None = None
    """Where its key starts and ends, if it is in a mapping."""
    size: int = 1
    """How many values it stands for, itself included."""
    depth: int = 0

    def data(self) -> Any:
        """The plain data that it stands for."""
        value = self.alias.value if self.alias else self.value
        if type(value) is dict:
            return {key: node.data() for key, node in value.items()}
        return [node.data() for node in value] if type(value) is list else value


@dataclass
class Parsed:
    """Plain data, and the text that it was read from."""

    data: Any
    text: str
    """Without the byte order mark that it may have begun with."""
    byte_order_mark: str
    kind: Literal["yaml", "json"]

    @cached_property
    def root(self) -> Node | None:
        """The tree of the values as they stand in the text; None if there is none in it."""
        builder = _Builder(self.text, None)
        (_read_yaml if self.kind == "yaml" else _read_json)(builder)
        return builder.root

    @cached_property
    def places(self) -> Places:
        """The lines and columns of the text."""
        return Places(self.text)


class Places:
    """The lines and columns (from 1) of the characters of a text. Quick for places near the one asked for before."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._index = 0
        self._line = 1

    def __getitem__(self, index: int) -> Position:
        text = self._text
        low, high = min(index, self._index), max(index, self._index)
        breaks = text.count("\n", low, high)
        if returns := text.count("\r", low, high):
            breaks += returns - text.count("\r\n", low, high)
        self._line += breaks if index > self._index else -breaks
        self._index = index
        start = text.rfind("\n", 0, index) + 1
        return self._line, index - max(start, text.rfind("\r", start, index) + 1) + 1


def parse_yaml(text: str, file: str | None = None) -> Parsed:
    """The data of a YAML text. Anchors and aliases stand for copies.

    Raises:
        DocumentError: it is not YAML 1.2, has duplicate keys, tags or merge keys, or is out of bounds.
    """
    mark, text = _begun(text, file)
    builder = _Builder(text, file)
    _read_yaml(builder)
    parsed = Parsed(builder.root.data() if builder.root else None, text, mark, "yaml")
    parsed.root = builder.root
    return parsed


def parse_json(text: str, file: str | None = None) -> Parsed:
    """The data of a JSON text.

    Raises:
        DocumentError: it is not JSON, has duplicate keys, NaN or infinity, or is out of bounds.
    """
    mark, text = _begun(text, file)
    _check_count(text, file)
    flaws: list[object] = []

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs) or (made and max(map(len, made)) > MAX_KEY):
            flaws.append("key")
        return made

    def integer(text: str) -> int:
        if len(text) <= MAX_DIGITS:
            return int(text)
        flaws.append("digits")
        return 0

    def real(text: str) -> float:
        number = float(text)
        if math.isinf(number):
            flaws.append("infinity")
        return number

    try:
        data = json.loads(
            text, object_pairs_hook=mapping, parse_constant=flaws.append, parse_int=integer, parse_float=real
        )
    except json.JSONDecodeError as error:
        raise DocumentError([Problem("$", f"not JSON: {error.msg}", file, error.lineno, error.colno)]) from error
    except RecursionError:
        data = None
        flaws.append("depth")
    if flaws or _is_deep(data) or _may_have_surrogates(text):
        _read_json(_Builder(text, file))  # says what is wrong, and where
    return Parsed(data, text, mark, "json")


def dump_yaml(data: Any) -> str:
    """Plain data as YAML text that reads back equal, by YAML 1.2 and by 1.1; every scalar on one line.

    Raises:
        ConfigError: there is something in it that YAML cannot say; with its path.
    """
    check_writable(data)
    return _dumped(data, flow=False)


def dump_flow(data: Any) -> str:
    """Writable data as YAML on one line, with brackets and braces, as it may stand among others."""
    return _dumped([data], flow=True)[1:-2]


def dump_json(data: Any) -> str:
    """Plain data as indented JSON text. An infinite number, which JSON has not, is written as a call of `float`.

    Raises:
        ConfigError: there is something in it that JSON cannot say; with its path.
    """
    check_writable(data)
    return json.dumps(_finite(data), indent=2, ensure_ascii=False)


def check_writable(data: Any) -> None:
    """Refuse what no text can say, or what could not be read back.

    Raises:
        ConfigError: says what it is, and its path.
    """
    count = 0

    def check(value: Any, path: Path) -> None:
        nonlocal count
        count += 1
        if flaw := _flaw(value):
            raise ConfigError(f"{shown(path)} cannot be written: {flaw}")
        if count > MAX_VALUES or len(path) > MAX_DEPTH:  # what holds itself is among these
            bound = f"more than {MAX_VALUES} values" if count > MAX_VALUES else f"nested more than {MAX_DEPTH} deep"
            raise ConfigError(f"$ cannot be written: {bound}")
        if type(value) is dict:
            for key, item in value.items():
                if type(key) is not str or len(key) > MAX_KEY or _flaw(key):
                    raise ConfigError(f"{shown(path)} cannot be written: {_key_flaw(key)}")
                check(item, (*path, key))
        elif type(value) in (list, tuple):
            for index, item in enumerate(value):
                check(item, (*path, index))

    check(data, ())


def _flaw(value: Any) -> str:
    """Why no text can say `value` by itself; empty if one can."""
    kind = type(value)
    if kind is str:
        wrong = None if value.isascii() else _SURROGATE.search(value)
        return f"U+{ord(wrong[0]):04X} is half of a character" if wrong else ""
    if kind is float:
        return "not a number is not a value" if math.isnan(value) else ""
    if kind is int:
        return f"a number of more than {MAX_DIGITS:,} digits" if abs(value) >= _TOO_LARGE else ""
    return "" if value is None or kind in (bool, dict, list, tuple) else f"a {kind.__qualname__} is not plain data"


def _key_flaw(key: Any) -> str:
    if type(key) is not str:
        return f"keys must be text, and {got(key)} is none"
    return _flaw(key) or f"a key longer than {MAX_KEY} characters"


def _finite(data: Any) -> Any:
    """`data` with infinite numbers in the form that documents have for them."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    if isinstance(data, float) and math.isinf(data):
        return {"_target_": "builtins.float", "_args_": [str(data)]}
    return data


class _Builder:
    """Makes a tree of what comes out of a text, keeps it within bounds, and collects all that is wrong."""

    def __init__(self, text: str, file: str | None) -> None:
        self.text = text
        self.root: Node | None = None
        self._file = file
        self._places = Places(text)
        self._problems: list[Problem] = []
        self._open: list[_Open] = []
        self._anchors: dict[str, Node] = {}
        self._size = 0

    def scalar(self, node: Node, text: str, read: Callable[[str], Any]) -> None:
        """A scalar; `read` makes its value of `text`, and a ValueError is a problem."""
        self._check_bounds(node)
        try:
            node.value = read(text)
        except ValueError as error:
            self.problem(str(error), node.start)
        self._put(node)

    def alias(self, node: Node, name: str) -> None:
        """An alias of what was anchored as `name`."""
        meant = self._anchors.get(name)
        if meant is None:
            self.problem(f"undefined alias *{name}", node.start)
        elif any(meant is opened.node for opened in self._open):
            self.problem(f"the alias *{name} stands inside what it is an alias of", node.start)
        else:
            node.alias = meant.alias or meant
            node.size, node.depth = meant.size, meant.depth
        self._check_bounds(node)
        self._put(node)

    def anchor(self, node: Node, name: str | None) -> None:
        """Remember what `name` stands for from here on."""
        if name is not None:
            node.anchored = True
            self._anchors[name] = node

    def open(self, node: Node) -> None:
        """A collection begins."""
        self._check_bounds(node)
        self._open.append(_Open(node))

    def close(self, end: int) -> None:
        """The collection that began last is complete; `end` is where its closing bracket ends, if it has any."""
        node = self._open.pop().node
        if node.style:
            node.end = end
        self._put(node)

    def problem(self, message: str, index: int, *below: str) -> None:
        """Note what is wrong at a character of the text."""
        path = (*(opened.step for opened in self._open if opened.step is not None), *below)
        self._problems.append(Problem(shown(path), message, self._file, *self._places[index]))
        if len(self._problems) == MAX_PROBLEMS:
            self.give_up(f"reading stops after {MAX_PROBLEMS} problems", index)

    def give_up(self, message: str, index: int | None) -> NoReturn:
        """Stop for a problem of the whole document."""
        place = self._places[index] if index is not None else (None, None)
        raise DocumentError([*self._problems, Problem("$", message, self._file, *place)])

    def finish(self) -> None:
        """Raise what was found."""
        if self._problems:
            raise DocumentError(self._problems)

    def _put(self, node: Node) -> None:
        """Put a complete value where it belongs."""
        if not self._open:
            self.root = node
            return
        opened = self._open[-1]
        if opened.is_list:
            opened.node.value.append(node)
        elif opened.wants_key:
            opened.wants_key = False
            opened.key = node.start, node.end
            opened.step = self._key(node, opened.node.value)
            return
        else:
            node.key = opened.key
            if opened.step is not None:
                opened.node.value[opened.step] = node
            opened.wants_key, opened.step = True, None
        opened.add(node)

    def _key(self, node: Node, siblings: dict[str, Node]) -> str | None:
        key = node.alias.value if node.alias else node.value
        if not isinstance(key, str):
            self.problem("keys must be text: quote this one", node.start)
        elif len(key) > MAX_KEY:
            self.problem(f"a key longer than {MAX_KEY} characters", node.start)
        elif key == "<<" and not node.style:
            self.problem("merge keys are not YAML 1.2: write out what << would bring", node.start)
        elif key in siblings:
            self.problem("duplicate key", node.start, key)
        else:
            return key
        return None

    def _check_bounds(self, node: Node) -> None:
        if not (self._open and self._open[-1].wants_key):
            self._size += node.size
        if self._size > MAX_VALUES:
            self.give_up(f"more than {MAX_VALUES} values", node.start)
        if len(self._open) + node.depth > MAX_DEPTH:
            self.give_up(f"nested more than {MAX_DEPTH} deep", node.start)


class _Open:
    """A collection that is not complete."""

    __slots__ = ("is_list", "key", "node", "step", "wants_key")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.is_list = isinstance(node.value, list)
        self.wants_key = not self.is_list
        self.key: tuple[int, int] | None = None  # where the last key is
        self.step: str | int | None = 0 if self.is_list else None  # where the next value goes

    def add(self, node: Node) -> None:
        holder = self.node
        if self.is_list:
            self.step = len(holder.value)
        holder.end = node.end
        holder.size += node.size
        holder.depth = max(holder.depth, node.depth + 1)


def _read_yaml(builder: _Builder) -> None:
    from yaml import MarkedYAMLError, YAMLError

    if wrong := _UNPRINTABLE.search(builder.text):
        code = f"U+{ord(wrong[0]):04X}"
        builder.give_up(f"the character {code} cannot stand in YAML: escape it, in double quotes", wrong.start())
    try:
        _build_yaml(builder, _events(builder.text))
    except MarkedYAMLError as error:
        said = " ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        is_deep = error.problem == "exceeded maximum nesting depth"  # libyaml 0.2.6 reads ahead, to a depth of 1000
        found = f"nested more than {MAX_DEPTH} deep" if is_deep else f"not YAML: {said}"
        builder.give_up(found, mark.index if mark else None)
    except YAMLError as error:
        builder.give_up(f"not YAML: {error}", None)
    builder.finish()


def _events(text: str) -> Iterator[Any]:
    import yaml

    events: Iterator[Any] = yaml.parse(text, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    return events


def _build_yaml(builder: _Builder, events: Iterator[Any]) -> None:
    import yaml

    for event in events:
        start, end = event.start_mark.index, event.end_mark.index
        if isinstance(event, yaml.ScalarEvent):
            node = Node(start, end, style=event.style or "")
            _check_tag(builder, event)
            builder.anchor(node, event.anchor)
            builder.scalar(node, event.value, str if node.style else _core)
        elif isinstance(event, yaml.CollectionStartEvent):
            value: Any = [] if isinstance(event, yaml.SequenceStartEvent) else {}
            node = Node(start, end, value, "{" if event.flow_style else "")
            _check_tag(builder, event)
            builder.open(node)
            builder.anchor(node, event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            builder.close(end)
        elif isinstance(event, yaml.AliasEvent):
            builder.alias(Node(start, end), str(event.anchor))
        elif isinstance(event, yaml.DocumentStartEvent):
            if builder.root:
                builder.give_up("not YAML of one document: another document begins here", start)
            if event.version and event.version != (1, 2):
                version = ".".join(map(str, event.version))
                builder.problem(f"documents are read as YAML 1.2, not {version}: remove this line", start)


def _check_tag(builder: _Builder, event: Any) -> None:
    """Refuse tags: plain data needs none, and others would be code."""
    if event.tag is not None:
        tag = event.tag.replace("tag:yaml.org,2002:", "!!")
        builder.problem(f"the tag {tag} is not allowed: write plain data", event.start_mark.index)


def _read_json(builder: _Builder) -> None:
    """Read what `json.loads` has found to be JSON, as far as it is within bounds."""
    for token in _JSON_TOKEN.finditer(builder.text):
        text, (start, end) = token[0], token.span()
        if text in ("[", "{"):
            builder.open(Node(start, end, [] if text == "[" else {}, "{"))
        elif text in ("]", "}"):
            builder.close(end)
        else:
            style = '"' if text.startswith('"') else ""
            builder.scalar(Node(start, end, style=style), text, _json_scalar)
    builder.finish()


def _json_scalar(text: str) -> Any:
    value = json.loads(text, parse_constant=_refuse_constant, parse_int=_integer, parse_float=_float)
    if isinstance(value, str):
        _check_text(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _core(text: str) -> Any:
    """A plain scalar by YAML 1.2's core schema."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if text[0] not in "+-.0123456789":
        return text
    if _INTEGER.fullmatch(text):
        return _integer(text)
    if _BASED.fullmatch(text):
        return _based(text)
    if _OCTAL.fullmatch(text):
        raise ValueError(
            f"{text[:20]} may be an octal number, a decimal one or text: drop the zero, write 0o, or quote it"
        )
    if _FLOAT.fullmatch(text):
        return _float(text)
    if infinity := _INFINITY.fullmatch(text):
        return float(infinity[1] + "inf")
    if text in (".nan", ".NaN", ".NAN"):
        raise ValueError("not a number is not a value")
    return text


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits: quote it if it is text")
    return int(text)


def _based(text: str) -> int:
    number = int(text, 0)  # takes time in proportion to its length, and so may come before the check
    if number >= _TOO_LARGE:
        raise ValueError(f"a number of more than {MAX_DIGITS:,} decimal digits: quote it if it is text")
    return number


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is too large for a number: quote it if it is text")
    return number


def _begun(text: str, file: str | None) -> tuple[str, str]:
    """The byte order mark at the beginning of a text, if there is one, and the text after it."""
    if len(text) > MAX_BYTES:
        raise DocumentError([Problem("$", f"larger than {MAX_BYTES // 2**20} MiB", file)])
    mark = BYTE_ORDER_MARK if text.startswith(BYTE_ORDER_MARK) else ""
    return mark, text[len(mark) :]


def _check_count(text: str, file: str | None) -> None:
    """Refuse JSON of too many values before anything is made of it."""
    if text.count(",") + text.count("[") + text.count("{") < MAX_VALUES:
        return
    bare = re.sub(rf"{_STRING}|\s+", "", text)
    if bare.count(",") + sum(bare.count(a) - bare.count(b) for a, b in (("[", "[]"), ("{", "{}"))) >= MAX_VALUES:
        raise DocumentError([Problem("$", f"more than {MAX_VALUES} values", file)])


def _is_deep(data: Any) -> bool:
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        inner = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list))]
        level = [value for values in inner for value in values]
    return bool(level)


def _may_have_surrogates(text: str) -> bool:
    return not (text.isascii() and "\\u" not in text) and _JSON_SURROGATE.search(text) is not None


def _check_text(text: str) -> None:
    if flaw := _flaw(text):
        raise ValueError(f"{flaw}: it cannot be in a text")


def _dumped(data: Any, *, flow: bool) -> str:
    import yaml

    return str(
        yaml.dump(data, Dumper=_dumper(), default_flow_style=flow, allow_unicode=True, width=2**31 - 1, sort_keys=False)
    ).removesuffix("...\n")


@cache
def _dumper() -> type[Dumper]:
    """PyYAML's safe dumper, without aliases for what stands in two places, and strict about text."""
    import yaml

    base = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    strict: Any = type("StrictDumper", (base,), {"ignore_aliases": lambda self, data: True})
    strict.yaml_representers = base.yaml_representers | {str: _represent_text}
    made: type[Dumper] = strict
    return made


def _represent_text(dumper: SafeRepresenter, text: str) -> ScalarNode:
    style = None if _is_clear(text) else "'"
    # Line separators, tabs and the like are best seen; and a scalar stays on its line.
    style = style if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _is_clear(text: str) -> bool:
    """Whether `text`, written plainly, is text to YAML 1.2, and y and n to 1.1. (The rest of 1.1 PyYAML knows.)"""
    try:
        return isinstance(_core(text), str) and text not in ("y", "Y", "n", "N")
    except ValueError:
        return False
