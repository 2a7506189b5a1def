"""How readers say no: a ReadError carries what was found, at which path below the value at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_origin

from bridge.config import hints
from bridge.config.paths import Path

Found = list[tuple[Path, str]]


class ReadError(Exception):
    """What was read is not acceptable.

    `found` are the problems. If the value at hand is plainly of the wrong kind, `wanted` says what was expected, so
    that the expectations of a union's members can be told in one sentence, and `hint` is what to add to it.
    """

    def __init__(self, found: Found, *, wanted: str | None = None, hint: str = "") -> None:
        super().__init__(found)
        self.found = found
        self.wanted = wanted
        self.hint = hint


def refused(message: str, *path: str | int) -> ReadError:
    """The error with one problem, at `path` below the value at hand."""
    return ReadError([(path, message)])


def unexpected(wanted: str, value: object, hint: str = "") -> ReadError:
    """The error about a value of the wrong kind."""
    return ReadError([((), f"expected {wanted}, got {got(value)}{hint}")], wanted=wanted, hint=hint)


@contextmanager
def below(*path: str | int) -> Iterator[None]:
    """What is refused inside is refused at `path` below the value at hand."""
    try:
        yield
    except ReadError as error:
        raise ReadError([((*path, *inner), message) for inner, message in error.found]) from error.__cause__


def wanted_for(members: tuple[Any, ...]) -> str:
    """What a place annotated with the union of `members` expects."""
    return " or ".join(dict.fromkeys(_described(member) for member in members))


def _described(member: Any) -> str:
    if hints.is_dtype(member):
        return "a dtype such as 'torch.bfloat16'"
    if hints.is_enum(member):
        return f"one of {', '.join(member.__members__)}"
    if hints.is_callable(member):
        return "the name of a function"
    if hints.is_class(member):
        return "the name of a class"
    return f"a {getattr(get_origin(member) or member, '__name__', member)}"


def kind(value: object) -> str:
    """What sort of object a name turned out to stand for."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


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
