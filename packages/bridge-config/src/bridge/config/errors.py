"""The exceptions of bridge-config, the base class of all Bridge exceptions, and helpers for messages."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import bridge

_MAX_NAME = 200  # characters, over twice the longest known name; names of a document are untrusted and may be huge


class BridgeError(Exception):
    """Base of all errors that a user can fix. The command line prints the message without a traceback."""


class ConfigError(BridgeError, ValueError):
    """Invalid user input; the message says what is wrong, where, and what to do."""


class TargetError(ConfigError):
    """A name in a document is unknown, not allowed, or refers to an object of the wrong kind."""


class OmittedWarning(UserWarning):
    """A written document lacks a value that cannot be encoded, or has a value that cannot be read back."""


@dataclass(frozen=True)
class Problem:
    """One problem in a document.

    `path` is its path in the document (`$.transformer.num_layers`). `file` is the file, preset or override that the
    value came from. `line` and `column` count from 1.
    """

    path: str
    message: str
    file: str | None = None
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        parts = [place, self.path, self.message]
        if self.path == "$" and self.file is not None and self.line is None:
            del parts[1]  # the file says where: "model.yaml: no such file"
        return ": ".join(filter(None, parts))


class DocumentError(ConfigError):
    """A document cannot be read or is invalid. `problems` lists all problems found, up to a limit."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[DocumentError], tuple[list[Problem]]]:
        return DocumentError, (self.problems,)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called Bridge, skipping all frames inside Bridge."""
    # Bridge is a namespace package: its path lists a folder per installed distribution.
    warnings.warn(message, category, skip_file_prefixes=tuple(os.path.join(folder, "") for folder in bridge.__path__))


def quote_name(name: str) -> str:
    """Return `name` quoted for a message, on one line and with a limited length."""
    return repr(name) if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]!r}..."


def shorten(name: str) -> str:
    """Return `name` for a message, with a limited length."""
    return name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}..."


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Return the end of a message about the unknown `name`, suggesting the closest known name; empty if none is close.

    `prefix` is prepended to the suggestion. The search takes milliseconds, so callers limit how often they call it.
    """
    close = find_closest(name, known)
    return f"; did you mean {prefix + close!r}?" if close is not None else ""


def find_closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to `name`; None if there is none."""
    import difflib  # few messages need it, and the import slows down every start

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6) if len(name) <= _MAX_NAME else []
    return close[0] if close else None
