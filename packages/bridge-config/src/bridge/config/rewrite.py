"""The result of converting a document: the new document, the moves of its values, notes and problems."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bridge.config.paths import Path


@dataclass
class Migration:
    """A document converted from an older version or another system."""

    data: Any
    """The document; the original object if nothing changed."""

    moves: list[tuple[Path, Path]] = field(default_factory=list)
    """Pairs of the new and the old path of a value."""

    notes: list[str] = field(default_factory=list)
    """What was changed, one line each."""

    problems: list[tuple[Path, str]] = field(default_factory=list)
    """Problems, by their path in the original document."""
