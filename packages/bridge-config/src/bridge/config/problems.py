"""How readers say no: a ReadError carries what was found, at which path below the value at hand."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

from bridge.config.paths import Path

ProblemList = list[tuple[Path, str]]
MAX_PROBLEMS = 100
"""So many problems of one document are told."""


class ReadError(Exception):
    """What was read is not acceptable; `found` are the problems."""

    def __init__(self, problems: ProblemList) -> None:
        super().__init__(problems)
        self.problems = problems


def make_error(message: str, *path: str | int) -> ReadError:
    """The error with one problem, at `path` below the value at hand."""
    return ReadError([(path, message)])


def make_mismatch_error(wanted: str, value: object, hint: str = "") -> ReadError:
    """The error about a value of the wrong kind."""
    return make_error(f"expected {wanted}, got {describe_value(value)}{hint}")


@contextmanager
def prefix_path(*path: str | int) -> Iterator[None]:
    """What is refused inside is refused at `path` below the value at hand."""
    try:
        yield
    except ReadError as error:
        raise ReadError([((*path, *inner), message) for inner, message in error.problems]) from error.__cause__


def describe_value(value: object, limit: int = 60) -> str:
    """`value` as a message shows it: on one line of at most `limit` characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "something too large to show"
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def abbreviate(value: object) -> str:
    """`value` as a note shows it, with what is inside, as far as there is room."""
    try:
        return reprlib.repr(value)
    except ValueError:  # as in `describe_value`
        return "something too large to show"


def to_path_step(key: object) -> str | int:
    """`key` as a step of a path; in data that was never a text, keys can be anything."""
    return key if isinstance(key, str) or (type(key) is int and 0 <= key < 2**63) else describe_value(key)
