"""How far a training run is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Training steps taken, and samples trained on."""

    step: int = 0
    samples: int = 0
