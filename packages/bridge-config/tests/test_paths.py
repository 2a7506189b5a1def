"""Paths of values in documents are parsed and formatted."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.config import ConfigError
from bridge.config.paths import format_path, parse_path


@pytest.mark.parametrize("path", ["a[0]b", 'a["b"]c', "a..b", ".a", "a.", "$a.b[", "[0]a", "$..a", "a.[0]"])
def test_invalid_paths_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="is not a path"):
        parse_path(path)


@pytest.mark.parametrize(
    ("text", "path"),
    [("$schema", ("$schema",)), ("$", ()), ("", ()), ("$.$x", ("$x",)), ("$[0].a", (0, "a")), ('["q"].z', ("q", "z"))],
)
def test_paths_are_parsed(text: str, path: tuple[str | int, ...]) -> None:
    assert parse_path(text) == path
    assert parse_path(format_path(path)) == path


@given(st.lists(st.text(min_size=1) | st.integers(min_value=0), max_size=5))
def test_formatted_paths_parse_back(path: list[str | int]) -> None:
    assert parse_path(format_path(tuple(path))) == tuple(path)


@given(st.text(alphabet='a.[]"\\\\$0\x01 é'))
def test_any_text_is_a_path_or_an_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_path(format_path(parse_path(text))) == parse_path(text)
