"""Finding: one line of `bridge doctor`, and the entry-point group of functions that return some."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = "bridge.doctor"
"""The entry-point group of functions without arguments that return an iterable of findings."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact about this installation or machine, and what follows from it."""

    section: str
    name: str
    value: str
    meaning: str = ""
    """What follows, or what to do."""

    is_problem: bool = False
    """Whether something fails because of it."""
