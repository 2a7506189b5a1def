"""Printing of tables and lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def print_parts(parts: Sequence[RenderableType]) -> None:
    """Print tables and lines, as wide as the terminal."""
    from rich.console import Console  # takes 0.1 s, which `bridge -h` must not wait for

    console = Console()
    for part in parts:
        console.print(part)
