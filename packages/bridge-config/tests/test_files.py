from __future__ import annotations

import contextlib
import json
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.config import DocumentError
from bridge.config.files import MAX_BYTES, dump_json, dump_yaml, parse_json, parse_yaml
from bridge.config.paths import parsed, shown


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-1.5e+3", -1500.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("True", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("0", 0),
        ("-7", -7),
        ("+7", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("'1'", "1"),
        ("=", "="),
        ("1.2.3", "1.2.3"),
        ("18446744073709551616", 2**64),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("[1, 1e-5, no]", [1, 1e-5, "no"]),
        ("|\n  012\n", "012\n"),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(f"a: {text}").data["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3", 3, "duplicate key"),
        ("x:\n  a: 1\n  a: 2", 3, "duplicate key"),
        ("a: 012", 1, "octal"),
        ("a: .nan", 1, "not a number"),
        ("a: [1", 1, "not YAML"),
        ("a: b: c", 1, "not YAML"),
        ("a: 1\n---\nb: 2", 2, "another document"),
        ("1: a", 1, "keys must be text"),
        ("true: a", 1, "keys must be text"),
        ("? [a]\n: b", 1, "keys must be text"),
        ("a: !!python/object/apply:os.system [ls]", 1, "the tag !!python/object/apply:os.system is not allowed"),
        ("a: !foo {}", 1, "the tag !foo is not allowed"),
        ("a: !!int '3'", 1, "the tag !!int is not allowed"),
        ("a: !!str 5", 1, "the tag !!str is not allowed"),
        ("a: !!binary aGk=", 1, "the tag !!binary is not allowed"),
        ("a: &x [*x]", 1, "the alias \\*x stands inside what it is an alias of"),
        ("a: *x", 1, "undefined alias"),
    ],
)
def test_yaml_that_is_refused(text: str, line: int, message: str) -> None:
    with pytest.raises(DocumentError, match=message) as error:
        parse_yaml(text, "file.yaml")
    assert [(problem.file, problem.line) for problem in error.value.problems] == [("file.yaml", line)]


def test_all_problems_of_a_yaml_text_are_told_at_once() -> None:
    with pytest.raises(DocumentError) as error:
        parse_yaml("a: 012\nb: {c: .nan}\na: 1\n")
    assert [(problem.path, problem.line, problem.column) for problem in error.value.problems] == [
        ("$.a", 1, 4),
        ("$.b.c", 2, 8),
        ("$.a", 3, 1),
    ]


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": Infinity}', "{'a': 1}", '{"a": 1,}', "", "a: 1", '{"a": 012}'])
def test_json_that_is_refused(text: str) -> None:
    with pytest.raises(DocumentError, match="JSON"):
        parse_json(text, "file.json")


def test_duplicate_keys_in_json_are_told_with_their_place() -> None:
    with pytest.raises(DocumentError, match=r"file.json:2:3: \$.a.b: duplicate key"):
        parse_json('{"a": {"b": 1,\n  "b": 2}}', "file.json")


def test_anchors_stand_for_copies() -> None:
    data = parse_yaml("a: &x {k: [1]}\nb: *x").data
    assert data == {"a": {"k": [1]}, "b": {"k": [1]}}
    data["a"]["k"].append(2)
    assert data["b"] == {"k": [1]}


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    "text",
    [BOMB, "[" * 10_000, "- " * 10_000, "{a: " * 10_000, "? " * 10_000, "a: " + "9" * 100_000, "x" * (MAX_BYTES + 1)],
    ids=["aliases", "flow lists", "lists", "flow mappings", "keys", "a long number", "a long text"],
)
def test_oversized_texts_end_in_bounded_time(text: str) -> None:
    start = time.process_time()
    for parse in (parse_yaml, parse_json):
        try:
            found = parse(text).data
        except DocumentError:
            continue
        assert isinstance(found["a"], str), "a number of 100,000 digits is text"
    assert time.process_time() - start < 20


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
awkward = st.sampled_from(
    [
        "yes",
        "012",
        "1e-5",
        "~",
        "null",
        "0x1",
        ".5",
        "1_0",
        "=",
        "<<",
        "- a",
        "a: b",
        "#",
        " ",
        "",
        "\n",
        "é",
        "\x85",
        "\u2028",
        "a\n\nb",
    ]
)
data = st.recursive(
    scalars | awkward,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(awkward | st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), data, max_size=4))
def test_any_data_survives_both_texts(value: dict[str, Any]) -> None:
    assert parse_yaml(dump_yaml(value)).data == value
    assert parse_json(dump_json(value)).data == value


@settings(deadline=None)
@given(st.text())
def test_any_text_gives_data_or_a_document_error(text: str) -> None:
    for parse in (parse_yaml, parse_json):
        with contextlib.suppress(DocumentError):
            parse(text)


@given(st.lists(st.text(min_size=1) | st.integers(min_value=0), max_size=5))
def test_any_path_is_read_as_it_is_shown(path: list[str | int]) -> None:
    assert parsed(shown(tuple(path))) == tuple(path)


def test_json_stays_json() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        dump_json({"a": math.inf})
    assert json.loads(dump_json({"a": "é"})) == {"a": "é"}
