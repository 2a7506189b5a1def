"""Migration: the result of converting a document from an older version or another system."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bridge.config.paths import Path


@dataclass
class Migration:
    """A converted document, with what happened to its values."""

    data: Any
    """The document; the original object if nothing changed."""

    moves: list[tuple[Path, Path]] = field(default_factory=list)
    """Pairs (new path, old path), so that problems can be reported at the position in the original document."""

    notes: list[str] = field(default_factory=list)
    """Descriptions of the changes, one line each."""

    problems: list[tuple[Path, str]] = field(default_factory=list)
    """Problems, as pairs of a path in the original document and a message."""
