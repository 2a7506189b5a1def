"""Parsing and writing YAML and JSON: values, errors, bounds and positions."""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.config import ConfigError, DocumentError
from bridge.config.text.dump import dump_json, dump_yaml
from bridge.config.text.nodes import Places
from bridge.config.text.parse import ParsedText, parse_json, parse_yaml


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
def test_plain_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(f"a: {text}").data["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3", 3, "duplicate key"),
        ("x:\n  a: 1\n  a: 2", 3, "duplicate key"),
        ("a: 012", 1, "octal"),
        ("a: .nan", 1, "NaN is not allowed"),
        ("a: [1", 1, "not YAML"),
        ("a: b: c", 1, "not YAML"),
        ("a: 1\n---\nb: 2", 2, "another document"),
        ("1: a", 1, "keys must be strings"),
        ("true: a", 1, "keys must be strings"),
        ("? [a]\n: b", 1, "keys must be strings"),
        ("a: !!python/object/apply:os.system [ls]", 1, "the tag !!python/object/apply:os.system is not allowed"),
        ("a: !foo {}", 1, "the tag !foo is not allowed"),
        ("a: !!int '3'", 1, "the tag !!int is not allowed"),
        ("a: !!str 5", 1, "the tag !!str is not allowed"),
        ("a: !!binary aGk=", 1, "the tag !!binary is not allowed"),
        ("a: &x [*x]", 1, "the alias \\*x is inside the value that it refers to"),
        ("a: *x", 1, "undefined alias"),
        ("a: &x {b: 1}\n<<: *x", 2, r"merge keys \(<<\) are not part of YAML 1.2"),
        ("a: 1e400", 1, "too large for a float"),
        ("a: " + "1" * 5000, 1, "integer with 5,000 digits"),
        ("%YAML 1.1\n---\na: yes", 1, "read as YAML 1.2, not 1.1"),
        ("a: 1\n\x07", 2, r"the character U\+0007 is not allowed in YAML"),
        ("a: 1\nb: \ud800", 2, r"the character U\+D800 is not allowed in YAML"),
        ("a: 1\r\nb: 012\r\n", 2, "octal"),
        ("a: 1\rb: 012\r", 2, "octal"),
        ("a: '\u2028'\nb: 012", 2, "octal"),
        ("\ufeffa: 012", 1, "octal"),
    ],
)
def test_unsupported_yaml_is_refused(text: str, line: int, message: str) -> None:
    with pytest.raises(DocumentError, match=message) as error:
        parse_yaml(text, "file.yaml")
    assert [(problem.file, problem.line) for problem in error.value.problems] == [("file.yaml", line)]


@pytest.mark.parametrize("text", ["a: !%s 1", "a: *%s", "a: &%s [*%s]"])
def test_a_message_about_a_name_of_any_length_is_short(text: str) -> None:
    with pytest.raises(DocumentError) as error:
        parse_yaml(text.replace("%s", "x" * 1_000_000))
    assert len(str(error.value)) < 300


def test_all_problems_of_a_yaml_text_are_reported_together() -> None:
    with pytest.raises(DocumentError) as error:
        parse_yaml("a: 012\nb: {c: .nan}\na: 1\n")
    assert [(problem.path, problem.line, problem.column) for problem in error.value.problems] == [
        ("$.a", 1, 4),
        ("$.b.c", 2, 8),
        ("$.a", 3, 1),
    ]


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": Infinity}', "{'a': 1}", '{"a": 1,}', "", "a: 1", '{"a": 012}'])
def test_invalid_json_is_refused(text: str) -> None:
    with pytest.raises(DocumentError, match="JSON"):
        parse_json(text, "file.json")


def test_duplicate_json_keys_are_reported_with_their_position() -> None:
    with pytest.raises(DocumentError, match=r"file.json:2:3: \$.a.b: duplicate key"):
        parse_json('{"a": {"b": 1,\n  "b": 2}}', "file.json")


def test_aliases_give_copies() -> None:
    data = parse_yaml("a: &x {k: [1]}\nb: *x").data
    assert data == {"a": {"k": [1]}, "b": {"k": [1]}}
    data["a"]["k"].append(2)
    assert data["b"] == {"k": [1]}
    assert parse_yaml("a: &x 1\nb: [*x]\nc: &x 2\nd: *x").data == {"a": 1, "b": [1], "c": 2, "d": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# a comment", None),
        ("---\n", None),
        ("%YAML 1.2\n--- {a: 1}\n...\n", {"a": 1}),
        ("\ufeffa: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ("a: 1\rb: 2", {"a": 1, "b": 2}),
        ('"<<": 1', {"<<": 1}),
        ("a: &x k\n*x : 1", {"a": "k", "k": 1}),
        ('{"a":[1,"\\u00e9"]}', {"a": [1, "é"]}),
    ],
)
def test_texts_of_every_shape_are_read(text: str, value: Any) -> None:
    assert parse_yaml(text).data == value


# Parses the text of an expression with 600 MiB of address space; prints the results and the peak memory in MiB.
BOUNDED_PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (600 * 2**20, 600 * 2**20))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from bridge.config import DocumentError
from bridge.config.text.parse import parse_json, parse_yaml
import yaml
if sys.argv[2] == "python":
    del yaml.CBaseLoader
text = eval(sys.argv[1])
for parse in (parse_yaml, parse_json):
    try:
        parse(text)
        print("read")
    except DocumentError as error:
        print(error.problems[-1].message)
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


ALIAS_BOMB = r"""'a0: &a0 [x]\n' + ''.join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))"""
DEEP_ALIASES = r"""'a0: &a0 [x]\n' + ''.join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200))"""


@pytest.mark.parametrize(
    ("text", "yaml_says", "json_says"),
    [
        (ALIAS_BOMB, "more than 100000 values", "not JSON"),
        (DEEP_ALIASES, "nested more than 100 deep", "not JSON"),
        ("'[' * 10_000", "nested more than 100 deep", "not JSON|nested more than 100 deep"),
        ("'[' * 10_000 + ']' * 10_000", "nested more than 100 deep", "nested more than 100 deep"),
        ("'[' * 5_000_000", "nested more than 100 deep", "more than 100000 values"),
        ("'- ' * 10_000", "nested more than 100 deep", "not JSON"),
        ("'? ' * 10_000", "nested more than 100 deep", "not JSON"),
        ("''.join(' ' * i + f'a:\\n' for i in range(4000))", "nested more than 100 deep", "not JSON"),
        ("'{a: ' * 10_000", "nested more than 100 deep", "not JSON"),
        ("'{\"a\": ' * 5_000 + '1' + '}' * 5_000", "nested more than 100 deep", "nested more than 100 deep"),
        ("'a: ' + '9' * 1_000_000", "integer with 1,000,000 digits", "not JSON"),
        ("'{\"a\": ' + '9' * 1_000_000 + '}'", "integer with 1,000,000 digits", "integer with 1,000,000 digits"),
        ("'{\"a\": ' + '9' * 1_000_000 + '.0}'", "too large for a float", "too large for a float"),
        ("'[' + '1,' * 200_000 + '1]'", "more than 100000 values", "more than 100000 values"),
        ("'[' + '[],' * 3_000_000 + '1]'", "more than 100000 values", "more than 100000 values"),
        (
            "'{' + ','.join(f'\"{i}\": 1' for i in range(200_000)) + '}'",
            "more than 100000 values",
            "more than 100000 values",
        ),
        ("''.join(f'{i}: 1\\n' for i in range(200_000))", "stopped after 100 problems", "not JSON"),
        ("'x' * (10 * 2**20 + 1)", "larger than 10 MiB", "larger than 10 MiB"),
        ("'x' * (100 * 2**20)", "larger than 10 MiB", "larger than 10 MiB"),
        ("'{\"' + 'k' * 5_000_000 + '\": 1}'", "not YAML|key longer than 1024 characters", "key longer than 1024"),
        ("'? ' + 'k' * 100_000 + '\\n: 1'", "key longer than 1024 characters", "not JSON"),
    ],
)
def test_oversized_texts_are_refused_in_bounded_time_and_memory(text: str, yaml_says: str, json_says: str) -> None:
    yaml_message, json_message = parse_in_bounded_process(text, "c")
    assert re.search(yaml_says, yaml_message)
    assert re.search(json_says, json_message)


@pytest.mark.parametrize(
    ("text", "message"), [(ALIAS_BOMB, "values"), (DEEP_ALIASES, "deep"), ("'[' * 10_000", "deep")]
)
def test_bounds_are_the_same_without_libyaml(text: str, message: str) -> None:
    assert message in parse_in_bounded_process(text, "python")[0]


def parse_in_bounded_process(text: str, loader: str) -> tuple[str, str]:
    """Parse the text of an expression as YAML and as JSON in a process with limited memory; return the messages."""
    command = [sys.executable, "-c", BOUNDED_PROGRAM, text, loader]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    yaml_message, json_message, peak = done.stdout.splitlines()
    assert int(peak) < 300
    return yaml_message, json_message


def test_texts_within_the_bounds_are_read() -> None:
    deep = "[" * 100 + "]" * 100
    wide = json.dumps(list(range(99_999)))
    long = json.dumps({"k" * 1024: int("9" * 4300), "text": "9," * 500_000})
    for text in (deep, wide, '{"a": [,]}'.replace("[,]", "[" + "[], " * 49_000 + "1]")):
        assert parse_yaml(text).data == parse_json(text).data
    assert parse_json(long).data["text"] == "9," * 500_000
    assert parse_yaml(f"0x{10**4300 - 1:x}").data == 10**4300 - 1


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
def test_any_data_survives_both_text_formats(value: dict[str, Any]) -> None:
    assert parse_yaml(dump_yaml(value)).data == value
    assert parse_json(dump_json(value)).data == value


@settings(deadline=None)
@given(st.text())
def test_any_text_gives_data_or_a_document_error(text: str) -> None:
    for parse in (parse_yaml, parse_json):
        with contextlib.suppress(DocumentError):
            parse(text)


@settings(deadline=None)
@given(st.dictionaries(st.text(), data, max_size=4))
def test_yaml_1_1_readers_read_the_same_values(value: dict[str, Any]) -> None:
    assert yaml.safe_load(dump_yaml(value)) == value


@pytest.mark.parametrize(
    "text", ["y", "N", "yes", "off", "012", "0o17", "1e-5", "1_000", "12:30", "2024-01-01", "=", "<<"]
)
def test_ambiguous_strings_are_quoted(text: str) -> None:
    assert dump_yaml({text: text}) == f"'{text}': '{text}'\n"


@pytest.mark.parametrize("text", ["a b", "torch.float32", "http://x.y", "é", "a,b [c]"])
def test_unambiguous_strings_are_not_quoted(text: str) -> None:
    assert dump_yaml({"a": text}) == f"a: {text}\n"


@given(st.text())
def test_every_scalar_is_written_on_one_line(text: str) -> None:
    assert len(dump_yaml({"a": text}).splitlines()) == 1


@pytest.mark.parametrize("dump", [dump_yaml, dump_json])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r"\$.a\[1\] cannot be written: NaN is not allowed"),
        ("\ud800", r"\$.a\[1\] cannot be written: contains the unpaired surrogate U\+D800"),
        ({1, 2}, r"\$.a\[1\] cannot be written: a set is not plain data"),
        (10**5000, r"\$.a\[1\] cannot be written: integer with more than 4,300 digits"),
        ({"b": {1: 2}}, r"\$.a\[1\].b cannot be written: keys must be strings, got 1"),
        ({None: 2}, r"\$.a\[1\] cannot be written: keys must be strings, got null"),
        ({"\udfff": 2}, r"\$.a\[1\] cannot be written: a key contains the unpaired surrogate U\+DFFF"),
        ({"x" * 1025: 2}, r"\$.a\[1\] cannot be written: key longer than 1024 characters"),
        ([0] * 100_000, r"\$ cannot be written: more than 100000 values"),
    ],
    ids=lambda value: str(value)[:20].encode("ascii", "replace").decode() if type(value) is not int else "int",
)
def test_unwritable_data_is_refused(dump: Any, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dump({"a": [1, value]})


@pytest.mark.parametrize("dump", [dump_yaml, dump_json])
def test_data_that_contains_itself_is_refused(dump: Any) -> None:
    endless: list[Any] = []
    endless += [endless, endless]
    with pytest.raises(ConfigError, match="nested more than 100 deep"):
        dump({"a": endless})


def test_written_text_can_reach_the_bounds() -> None:
    deep: Any = {"a": [0] * 1000}
    for _ in range(98):
        deep = [deep]
    for dump, parse in ((dump_yaml, parse_yaml), (dump_json, parse_json)):
        assert parse(dump(deep)).data == deep
        with pytest.raises(ConfigError, match="nested more than 100 deep"):
            dump([deep])
        with pytest.raises(DocumentError, match="nested more than 100 deep"):
            parse(f"[{json.dumps(deep)}]")


def test_all_problems_of_a_json_text_are_reported_together() -> None:
    text = """{"\\ud83d\\ude00": {"a": NaN,\n\t"b": 1e999, "b": "\\ud83d"}, "c": 012}"""
    with pytest.raises(DocumentError, match=r"f:2:36: \$: not JSON"):
        parse_json(text, "f")
    with pytest.raises(DocumentError) as error:
        parse_json(text.replace("012", "Infinity"), "f")
    assert [str(problem) for problem in error.value.problems] == [
        'f:1:24: $["\\ud83d\\ude00"].a: NaN is not valid JSON',
        'f:2:7: $["\\ud83d\\ude00"].b: 1e999 is too large for a float: quote it if it is a string',
        'f:2:14: $["\\ud83d\\ude00"].b: duplicate key',
        'f:2:19: $["\\ud83d\\ude00"]: contains the unpaired surrogate U+D83D',
        "f:2:35: $.c: Infinity is not valid JSON",
    ]


@settings(deadline=None)
@given(st.dictionaries(st.text(), data, max_size=4))
def test_positions_of_all_values_are_known(value: dict[str, Any]) -> None:
    texts: list[tuple[ParsedText, Callable[[str], Any]]] = [
        (parse_json(dump_json(value)), json.loads),
        (parse_yaml(dump_yaml(value)), lambda key: parse_yaml(key).data),
    ]
    for found, read in texts:
        root = found.root
        assert root is not None
        assert root.to_data() == value
        for key, node in root.value.items():
            assert node.key is not None
            written = found.text[slice(*node.key)]
            assert read(written) == key
            line, column = found.places[node.key[0]]
            assert found.text.split("\n")[line - 1][column - 1 :].startswith(written)


def test_positions_do_not_depend_on_the_order_of_queries() -> None:
    text = "a\nb\r\nc\rd"
    places = Places(text)
    for index in (0, 8, 2, 5, 7, 0, 5):
        assert places[index] == ({0: 1, 2: 2, 5: 3, 7: 4, 8: 4}[index], 2 if index == 8 else 1)


def test_json_text_is_written_as_json() -> None:
    written = dump_json({"a": [math.inf, -math.inf], "b": "é"})
    assert json.loads(written, parse_constant=pytest.fail) == {
        "a": [{"_target_": "builtins.float", "_args_": [text]} for text in ("inf", "-inf")],
        "b": "é",
    }
