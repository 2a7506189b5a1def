"""What a conversion of a document did: the document it made, where each value came from, notes and problems."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bridge.config.paths import Path


@dataclass
class Migration:
    """A document made from an older or foreign one."""

    data: Any
    """The document; the very object that was given if there was nothing to do."""

    moves: list[tuple[Path, Path]] = field(default_factory=list)
    """Where a value stands now, and where it stood."""

    notes: list[str] = field(default_factory=list)
    """What was done, a line each."""

    problems: list[tuple[Path, str]] = field(default_factory=list)
    """What is wrong, by its path in the document that was given."""
