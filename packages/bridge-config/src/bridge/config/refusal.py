"""How readers say no: a ReadError carries what was found, at which path below the value at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bridge.config.paths import Path

Found = list[tuple[Path, str]]


class ReadError(Exception):
    """What was read is not acceptable; `found` are the problems."""

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self.found = found


def refused(message: str, *path: str | int) -> ReadError:
    """The error with one problem, at `path` below the value at hand."""
    return ReadError([(path, message)])


def unexpected(wanted: str, value: object, hint: str = "") -> ReadError:
    """The error about a value of the wrong kind."""
    return refused(f"expected {wanted}, got {got(value)}{hint}")


@contextmanager
def below(*path: str | int) -> Iterator[None]:
    """What is refused inside is refused at `path` below the value at hand."""
    try:
        yield
    except ReadError as error:
        raise ReadError([((*path, *inner), message) for inner, message in error.found]) from error.__cause__


def got(value: object) -> str:
    """`value` as a message shows it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
