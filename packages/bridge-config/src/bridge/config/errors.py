"""The errors of bridge-config: one small tree under `ConfigError`, and the root of every package's tree."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import bridge

_MAX_NAME = 200  # characters; no name that is known is half as long


class BridgeError(Exception):
    """What a Bridge package, or an extension, says to its user. The command line prints the message alone."""


class ConfigError(BridgeError, ValueError):
    """The user's input is at fault; the message says what, where and what to do."""


class TargetError(ConfigError):
    """A name in a document names nothing that documents may name, or something that does not fit its place."""


class OmittedWarning(UserWarning):
    """A document leaves out a value that has no written form, or holds one that is not read back as it was."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a document.

    `path` is where in the document (`$.transformer.num_layers`); `line` and `column` count from 1.
    `file` is the file, preset or override that the value came from.
    """

    path: str
    message: str
    file: str | None = None
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        return f"{place}: {self.path}: {self.message}" if place else f"{self.path}: {self.message}"


class DocumentError(ConfigError):
    """A document cannot be read or does not describe a configuration; `problems` lists everything found."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[DocumentError], tuple[list[Problem]]]:
        return DocumentError, (self.problems,)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called Bridge, however deep inside of it this is."""
    # The namespace's path names the folders of all packages.
    warnings.warn(message, category, skip_file_prefixes=tuple(os.path.join(folder, "") for folder in bridge.__path__))


def quote_name(name: str) -> str:
    """`name` as a message shows it: on one line, and not longer than names are."""
    return repr(name) if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]!r}..."


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """The end of a message about the unknown `name`: the closest known name, with `prefix` before it, or nothing.

    It takes milliseconds, so it is for messages that are few.
    """
    close = find_closest(name, known)
    return f"; did you mean {prefix + close!r}?" if close is not None else ""


def find_closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like the unknown `name`; None if none is like it."""
    import difflib  # few messages need it, and every start would pay for it

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6) if len(name) <= _MAX_NAME else []
    return close[0] if close else None
