"""Edits of YAML text: comments and lines of unchanged values are kept."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.config import ConfigError, Document
from bridge.config.documents.presets import list_presets
from bridge.config.paths import Path, format_path
from bridge.config.text.edit import edit_text
from bridge.config.text.parse import parse_yaml

Lines = tuple[int, int]

SCALARS: dict[str, Any] = {
    "1": 1,
    "-2.5": -2.5,
    "1e-5": 1e-5,
    "true": True,
    "~": None,
    "yes": "yes",
    "two words": "two words",
    "http://x.y/z": "http://x.y/z",
    "a,b [c]#d": "a,b [c]#d",
    "'it\u0027\u0027s'": "it's",
    '"a\\tb # no comment"': "a\tb # no comment",
    "torch.float32": "torch.float32",
}
KEYS = ["a", "b", "lr", "num_layers", "_target_", "a b", "1", "x: y", "é", "#", "-", "null", "it's"]
BLOCKS: list[tuple[str, list[str], str]] = [
    ("|", ["one", "  two", "", "# three"], "one\n  two\n\n# three\n"),
    ("|-", ["one", "two"], "one\ntwo"),
    (">", ["one", "two"], "one two\n"),
]
# A `|+` block includes the blank lines after it, so an edit may have to rewrite it in another style.
KEEPING = ("|+", ["one", "", ""], "one\n\n\n")
flow_data = st.recursive(
    st.sampled_from([1, -2.5, True, None, "yes", "a, b", "x: y", "#"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)
new_data = st.recursive(
    st.sampled_from(
        [None, True, False, 0, 1, 1.0, 1e-5, "", "yes", "a: b", "- c", "#", "x\n\ny\n", " é ", "\u2028", "*a"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)


@dataclass
class Written:
    """A generated YAML text with comments, its data, and the lines of each value."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    anchors: bool
    lines: list[str] = field(default_factory=list)
    data: Any = None
    spans: dict[Path, Lines] = field(default_factory=dict)
    in_flow: set[Path] = field(default_factory=set)
    comments: int = 0
    anchored: list[Any] = field(default_factory=list)
    newline: str = "\n"
    ends: bool = True

    @property
    def text(self) -> str:
        return self.newline.join(self.lines) + (self.newline if self.ends else "")

    def one_of[T](self, *choices: T) -> T:
        chosen: T = self.draw(st.sampled_from(choices))
        return chosen

    def comment(self) -> str:
        self.comments += 1
        return f"# c{self.comments}."

    def trail(self) -> str:
        return self.one_of("", "", " ", "  ") + (f" {self.comment()}" if self.one_of(True, False) else "")

    def gap(self, column: int) -> None:
        for _ in range(self.one_of(0, 0, 0, 1, 2)):
            comment = " " * column + self.comment()
            blank = not self.lines or self.lines[-1]  # two blank lines end a block scalar
            self.lines.append(self.one_of("", comment) if blank else comment)

    def mapping(self, path: Path, column: int, *, inline: str | None = None) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key in self.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True)):
            if inline is None:
                self.gap(column)
            head = " " * column if inline is None else inline
            inline = None
            plain = re.fullmatch(r"\w+", key) and key not in ("1", "null")
            written = key if plain and self.one_of(True, False) else self.one_of(json.dumps(key), single_quoted(key))
            made[key] = self.value(f"{head}{written}:", (*path, key), column, in_mapping=True)
        return made

    def sequence(self, path: Path, column: int, *, inline: str | None = None) -> list[Any]:
        made: list[Any] = []
        for i in range(self.one_of(1, 2, 3)):
            if inline is None:
                self.gap(column)
            head = " " * column if inline is None else inline
            inline = None
            made.append(self.value(f"{head}-", (*path, i), column, in_mapping=False))
        return made

    def value(self, head: str, path: Path, column: int, *, in_mapping: bool) -> Any:
        first = len(self.lines)
        kinds = ["scalar", "scalar", "empty", "block", "flow"] + ["mapping", "sequence"] * (len(path) < 4)
        kind = self.one_of(*kinds, *(["alias"] if self.anchored else []))
        name = ""
        if self.anchors and kind not in ("alias", "empty") and self.one_of(True, False):
            name = f"n{len(self.lines)}-{len(path)}"
            head += f" &{name}"
        made = getattr(self, f"_{kind}")(head, path, column, in_mapping)
        self.spans[path] = (first, len(self.lines) - 1)
        if name:
            self.anchored.append((name, made))
        return made

    def _scalar(self, head: str, path: Path, column: int, in_mapping: bool) -> Any:
        text = self.one_of(*SCALARS)
        self.lines.append(head + self.one_of(" ", "   ") + text + self.trail())
        return SCALARS[text]

    def _empty(self, head: str, path: Path, column: int, in_mapping: bool) -> None:
        self.lines.append(head + self.trail())

    def _alias(self, head: str, path: Path, column: int, in_mapping: bool) -> Any:
        name, made = self.one_of(*self.anchored)
        self.lines.append(f"{head} *{name}{self.trail()}")
        return copy.deepcopy(made)

    def _block(self, head: str, path: Path, column: int, in_mapping: bool) -> str:
        indicator, content, said = self.one_of(*BLOCKS, *([KEEPING] if self.anchors else []))
        self.lines.append(f"{head} {indicator}{self.trail()}")
        self.lines += [" " * (column + 3) + line if line else "" for line in content]
        return said

    def _flow(self, head: str, path: Path, column: int, in_mapping: bool) -> Any:
        made = self.draw(flow_data.filter(lambda data: isinstance(data, (list, dict))))
        before = len(self.lines)
        if isinstance(made, list) and self.one_of(True, False):
            self.lines.append(f"{head} [{self.trail()}")
            self.lines += [" " * (column + 4) + json.dumps(item) + "," + self.trail() for item in made]
            self.lines.append(" " * (column + 2) + "]" + self.trail())
        else:
            self.lines.append(f"{head} {json.dumps(made)}{self.trail()}")
        for inner in paths_in(made):
            self.spans[(*path, *inner)] = (before, len(self.lines) - 1)
            self.in_flow.add((*path, *inner))
        self.in_flow.add(path)
        return made

    def _mapping(self, head: str, path: Path, column: int, in_mapping: bool) -> Any:
        if not in_mapping and "&" not in head and self.one_of(True, False):
            inline = head + self.one_of(" ", "  ")
            return self.mapping(path, len(inline), inline=inline)
        self.lines.append(head + self.trail())
        return self.mapping(path, column + self.one_of(1, 2, 4))

    def _sequence(self, head: str, path: Path, column: int, in_mapping: bool) -> Any:
        if not in_mapping and "&" not in head and self.one_of(True, False):
            inline = head + self.one_of(" ", "  ")
            return self.sequence(path, len(inline), inline=inline)
        self.lines.append(head + self.trail())
        return self.sequence(path, column + (self.one_of(0, 2) if in_mapping else 2))


def single_quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def paths_in(data: Any) -> list[Path]:
    """Return the paths of all values in `data`."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path for key, value in pairs for path in ((key,), *((key, *inner) for inner in paths_in(value)))]


@st.composite
def documents(draw: Callable[[st.SearchStrategy[Any]], Any], *, anchors: bool = False) -> Written:
    made = Written(draw, anchors, newline=draw(st.sampled_from(["\n", "\n", "\r\n"])))
    made.ends = draw(st.booleans())
    made.lines += draw(st.sampled_from([[], ["# top"], ["---"], ["# top", "", "--- # start"]]))
    made.data = made.mapping((), 0)
    made.gap(0)
    made.ends |= made.lines[-1].startswith("   ") or not made.lines[-1]  # a block scalar needs its final line break
    made.ends |= len(made.lines) == 1  # otherwise the text has no line break to copy
    return made


def get_at(data: Any, path: Path) -> Any:
    for step in path:
        data = data[step]
    return data


@st.composite
def edits(draw: Callable[[st.SearchStrategy[Any]], Any], *, anchors: bool = False) -> tuple[Written, str, Path, Any]:
    """Draw a document and one edit: set, remove or add."""
    written = draw(documents(anchors=anchors))
    what = draw(st.sampled_from(["set", "set", "remove", "add"]))
    paths = paths_in(written.data)
    if what == "add":
        holder = draw(st.sampled_from([path for path in ((), *paths) if isinstance(get_at(written.data, path), dict)]))
        key = draw(st.sampled_from([f"new{i}" for i in range(3)] + ["yes", "new key", "1e3"]))
        return written, what, (*holder, key), draw(new_data)
    return written, what, draw(st.sampled_from(paths)), draw(new_data) if what == "set" else None


def apply_edit(written: Written, what: str, path: Path, value: Any) -> tuple[Document, Any]:
    """Apply an edit; return the document and the expected data."""
    document = Document.from_text(parse_yaml(written.text), "a.yaml")
    assert document.data == written.data, "the generated data and the parsed text agree"
    meant = copy.deepcopy(written.data)
    holder = get_at(meant, path[:-1])
    if what == "remove":
        document.remove(format_path(path))
        del holder[path[-1]]
    else:
        document.set(format_path(path), copy.deepcopy(value))
        holder[path[-1]] = value
    return document, meant


def changeable_lines(written: Written, what: str, path: Path) -> Lines:
    """Return the first and last line that the edit may change.

    These are the lines of the value. If it is the only item of its container, or shares a line with it, they are the
    lines of the container.
    """
    holder = path[:-1]
    if what == "add" and holder not in written.in_flow:
        siblings = [written.spans.get((*holder, key)) for key in get_at(written.data, holder)]
        if siblings and all(siblings):  # otherwise the mapping is behind an alias
            last = max(lines[1] for lines in siblings if lines)
            return last + 1, last
    while path and (path not in written.spans or (what == "remove" and len(get_at(written.data, path[:-1])) == 1)):
        path, what = path[:-1], what if path in written.spans else "set"
    first, last = written.spans.get(path, (0, len(written.lines) - 1))
    if what == "remove" and first == written.spans.get(path[:-1], (-1, -1))[0] and path[:-1] not in written.in_flow:
        last += 1  # the next value moves up to the dash
        while not written.lines[last].strip():
            last += 1
    return first, last


@settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
@given(edits())
def test_an_edit_changes_only_the_lines_of_its_value(edit: tuple[Written, str, Path, Any]) -> None:
    written, what, path, _ = edit
    document, meant = apply_edit(*edit)
    text = document.to_yaml()
    assert json.dumps(parse_yaml(text).data, sort_keys=True) == json.dumps(meant, sort_keys=True)
    if not text.endswith(written.newline):
        text += written.newline
    first, last = changeable_lines(written, what, path)
    before, after = written.lines[:first], written.lines[last + 1 :]
    lines = text.split(written.newline)[:-1]
    assert len(lines) >= len(before) + len(after)
    assert lines[: len(before)] == before
    assert lines[len(lines) - len(after) :] == after
    if (
        what == "set"
        and path in written.spans
        and isinstance(get_at(written.data, path), (str, int, float, type(None)))
    ):
        for comment in re.findall(r"# c\d+\.", written.lines[first]):
            assert comment in text, "the comment beside the value is kept"


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(edits(anchors=True))
def test_an_edit_among_anchors_keeps_the_values_of_aliases(edit: tuple[Written, str, Path, Any]) -> None:
    written, what, path, _ = edit
    document, meant = apply_edit(*edit)
    text = document.to_yaml()
    assert json.dumps(parse_yaml(text).data, sort_keys=True) == json.dumps(meant, sort_keys=True)
    first, last = changeable_lines(written, what, path)
    for comment in re.findall(r"# c\d+\.", "\n".join([*written.lines[:first], *written.lines[last + 1 :]])):
        assert comment in text


@settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
@given(documents(anchors=True), st.dictionaries(st.sampled_from(KEYS), new_data, min_size=1, max_size=4))
def test_any_text_can_be_edited_into_any_data(written: Written, data: dict[str, Any]) -> None:
    text = edit_text(parse_yaml(written.text), data)
    assert json.dumps(parse_yaml(text).data, sort_keys=True) == json.dumps(data, sort_keys=True)


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(documents(anchors=True))
def test_without_a_change_the_text_is_the_same(written: Written) -> None:
    assert edit_text(parse_yaml(written.text), copy.deepcopy(written.data)) == written.text


COMMENTED = """\
# top
a: 1  # one
b:   # bee
  # in b
  c: "x"   # cee
  d: [1, 2,  # two
      3]
# before e
e:
- x: 1 # ex
  # about y
  y: 2
-
- z
f: |  # eff
  text

# after f
g: &g
  k: 1
h: *g
i:
"""


def edit_lines(text: str, change: Callable[[Any], None]) -> list[str]:
    """Apply `change` to the data of `text`; return the removed and added lines."""
    parsed = parse_yaml(text)
    data = copy.deepcopy(parsed.data)
    change(data)
    return changed_lines(text, edit_text(parsed, data))


def changed_lines(old: str, new: str) -> list[str]:
    return [line for line in difflib.ndiff(old.splitlines(), new.splitlines()) if line[0] in "+-"]


def set_at(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        get_at(data, path[:-1])[path[-1]] = to

    return change


def remove_at(*path: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        del get_at(data, path[:-1])[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (set_at("a", to=2), ["- a: 1  # one", "+ a: 2  # one"]),
        (set_at("a", to=True), ["- a: 1  # one", "+ a: true  # one"]),
        (set_at("a", to={"q": [1]}), ["- a: 1  # one", "+ a:  # one", "+   q:", "+   - 1"]),
        (set_at("b", "new", to="yes"), ["+   new: 'yes'"]),
        (
            set_at("b", to=7),
            ["- b:   # bee", "+ b: 7   # bee", '-   c: "x"   # cee', "-   d: [1, 2,  # two", "-       3]"],
        ),
        (set_at("b", "d", 1, to="no"), ["-   d: [1, 2,  # two", "+   d: [1, 'no',  # two"]),
        (remove_at("b", "c"), ['-   c: "x"   # cee']),
        (remove_at("e", 0, "x"), ["- - x: 1 # ex", "-   # about y", "+ - # about y"]),
        (remove_at("e", 0), ["- - x: 1 # ex", "-   # about y", "-   y: 2"]),
        (set_at("e", 1, to={"m": 1, "n": 2}), ["- -", "+ - m: 1", "+   'n': 2"]),
        (set_at("f", to="one"), ["- f: |  # eff", "+ f: one  # eff", "-   text"]),
        (set_at("g", "k", to=2), ["+   k: 2", "+ h:", "- h: *g"]),
        (set_at("h", "k", to=2), ["- h: *g", "+ h:", "+   k: 2"]),
        (remove_at("g"), ["- g: &g", "+ h:", "- h: *g"]),
        (set_at("i", to=1), ["- i:", "+ i: 1"]),
        (set_at("i", to=[]), ["- i:", "+ i: []"]),
        (set_at("j", to={"k": {"l": "x\ny"}}), ["+ j:", "+   k:", '+     l: "x\\ny"']),
    ],
)
def test_an_edit_changes_the_expected_lines(change: Callable[[Any], None], lines: list[str]) -> None:
    assert edit_lines(COMMENTED, change) == lines


@pytest.mark.parametrize(
    ("text", "data", "expected"),
    [
        ("", {"a": 1}, "a: 1\n"),
        ("# nothing yet", {"a": 1}, "# nothing yet\na: 1\n"),
        ("---\n# nothing\n", {"a": [1]}, "---\n# nothing\na:\n- 1\n"),
        ("--- {}\n", {"a": 1}, "--- \na: 1\n"),
        ("null  # no\n", {"a": 1}, "a: 1  # no\n"),
        ("{a: 1}  # flow\n", {"a": 1, "b": [2]}, "{a: 1, b: [2]}  # flow\n"),
        ("{a: 1, b: 2}", {"a": 1}, "{a: 1}"),
        ("[1, 2, 3]", [1, 3], "[1, 3]"),
        ("[\n  1,  # one\n  2,  # two\n]\n", [2], "[\n  2,  # two\n]\n"),
        ('{"a":1,"b":2}', {"a": 3, "b": None}, '{"a": 3,"b": null}'),
        ("{a, b: , c: 1}", {"a": 1, "b": 2, "c": 1}, "{a: 1, b: 2 , c: 1}"),
        ("a: |\n  text", {"a": "text", "b": 1}, "a: text\nb: 1"),
        ("a: |+\n  x\n\nb: 1\n\nc: 2\n", {"a": "x\n\n", "c": 2}, 'a: "x\\n\\n"\n\nc: 2\n'),
        ("a: 1\r\nb: 2\r\n", {"a": 1, "b": 2, "c": {"d": 3}}, "a: 1\r\nb: 2\r\nc:\r\n  d: 3\r\n"),
        ("\ufeffa: 1\n", {"a": 2}, "\ufeffa: 2\n"),
        ("? a\n: 1\n? b\n: 2\n", {"b": 3, "c": 1}, "? b\n: 3\nc: 1\n"),
        ("a: 1\n...\n", {"a": 2, "b": 3}, "a: 2\nb: 3\n...\n"),
        ("a:\n  - 1\n  - 2\n", {"a": [1, 2, {"b": 3}]}, "a:\n  - 1\n  - 2\n  - b: 3\n"),
        ("- - 1\n  - 2\n", [[2]], "- - 2\n"),
        ("a: &x 1\nb: [*x, *x]\n", {"a": 2, "b": [1, 1]}, "a: 2\nb: [1, 1]\n"),
        ("a: 1e-5\nb: 0x10\n", {"a": 1e-5, "b": 17}, "a: 1e-5\nb: 17\n"),
    ],
)
def test_edits_handle_texts_of_every_shape(text: str, data: Any, expected: str) -> None:
    assert edit_text(parse_yaml(text), data) == expected


def test_removing_one_of_several_equal_items_keeps_the_others() -> None:
    text = "a:\n- 1  # first\n- 1  # second\n- 1  # third\n"
    document = Document.from_text(parse_yaml(text), "a.yaml")
    document.remove("a[1]")
    assert document.to_yaml() == "a:\n- 1  # first\n- 1  # third\n"


def test_an_edit_that_cannot_be_made_in_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be changed in place"):
        edit_text(parse_yaml("? a\n? b\n"), {"a": 1, "b": None})


# The presets written by hand, and a few of the generated ones, which resemble each other.
EDITED_PRESETS = [
    name for name in list_presets() if "tiny" in name or name in ("deepseek-v3", "gpt-oss-20b", "gpt2-124m")
]


@pytest.mark.parametrize("name", EDITED_PRESETS)
@pytest.mark.skipif(not entry_points(group="bridge.presets"), reason="no presets are installed")
def test_changing_one_value_of_a_preset_changes_only_its_line(name: str) -> None:
    text = list_presets()[name].read_text(encoding="utf-8")
    for path in paths_in(parse_yaml(text).data):
        document = Document.load(name)
        old = document.get(format_path(path))
        if isinstance(old, dict):
            continue
        document.set(format_path(path), "changed")
        removed, added = changed_lines(text, document.to_yaml())
        assert removed[2:].split(":")[0] == added[2:].split(":")[0]
        assert re.search(r"(: |\[|, )changed\b", added)  # a list may be on one line
        assert removed.partition("  #")[2] == added.partition("  #")[2]
