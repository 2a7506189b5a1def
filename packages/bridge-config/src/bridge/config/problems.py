"""ReadError: problems found while reading, with paths relative to the current value."""

from __future__ import annotations

import reprlib

from bridge.config.paths import Path

ProblemList = list[tuple[Path, str]]
MAX_PROBLEMS = 100
"""Maximum problems reported per document."""


class ReadError(Exception):
    """A value cannot be read. `problems` are pairs of a path, relative to the current value, and a message."""

    def __init__(self, problems: ProblemList) -> None:
        super().__init__(problems)
        self.problems = problems


def make_error(message: str, *path: str | int) -> ReadError:
    """Return a ReadError with one problem, at `path` relative to the current value."""
    return ReadError([(path, message)])


def make_mismatch_error(wanted: str, value: object, hint: str = "") -> ReadError:
    """Return a ReadError about a value of the wrong type; `hint` is appended to its message."""
    return make_error(f"expected {wanted}, got {describe_value(value)}{hint}")


class prefix_path:  # noqa: N801 - used like contextlib.suppress; a generator would take three times as long
    """Prefix the paths of every ReadError raised inside with `path`."""

    def __init__(self, *path: str | int) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if isinstance(error, ReadError):
            problems = [((*self._path, *inner), message) for inner, message in error.problems]
            raise ReadError(problems) from error.__cause__


def describe_value(value: object, limit: int = 60) -> str:
    """Return `value` as text for a message: one line of at most `limit` characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return "a value too large to show"
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def abbreviate(value: object) -> str:
    """Return a shortened `repr` of `value` for a note."""
    try:
        return reprlib.repr(value)
    except ValueError:  # as in `describe_value`
        return "a value too large to show"


def to_path_step(key: object) -> str | int:
    """Return `key` as a step of a path. Keys of Python data, unlike those of YAML and JSON, can be any object."""
    return key if isinstance(key, str) or (type(key) is int and 0 <= key < 2**63) else describe_value(key)
