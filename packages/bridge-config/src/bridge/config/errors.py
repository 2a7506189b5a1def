"""The exceptions of bridge-config, and the base class of those of all Bridge packages."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import bridge

_MAX_NAME = 200  # characters, more than twice the longest known name


class BridgeError(Exception):
    """Base of all errors for the user. The command line prints the message without a traceback."""


class ConfigError(BridgeError, ValueError):
    """Invalid user input; the message says what is wrong, where, and what to do."""


class TargetError(ConfigError):
    """A name in a document is unknown, not allowed, or refers to something that does not fit there."""


class OmittedWarning(UserWarning):
    """A document lacks a value that cannot be written, or holds one that reads back differently."""


@dataclass(frozen=True)
class Problem:
    """One problem in a document.

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
    """A document cannot be read or is invalid; `problems` lists everything found."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[DocumentError], tuple[list[Problem]]]:
        return DocumentError, (self.problems,)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called Bridge, skipping all frames inside Bridge."""
    # The namespace's path names the folders of all packages.
    warnings.warn(message, category, skip_file_prefixes=tuple(os.path.join(folder, "") for folder in bridge.__path__))


def quote_name(name: str) -> str:
    """Return `name` quoted for a message, on one line and with a limited length."""
    return repr(name) if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]!r}..."


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Return the end of a message about the unknown `name`: the closest known name with `prefix`, or nothing.

    The search takes milliseconds: limit how often it is called.
    """
    close = find_closest(name, known)
    return f"; did you mean {prefix + close!r}?" if close is not None else ""


def find_closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to `name`; None if there is none."""
    import difflib  # few messages need it, and the import slows down every start

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6) if len(name) <= _MAX_NAME else []
    return close[0] if close else None
