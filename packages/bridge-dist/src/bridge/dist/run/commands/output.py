"""What commands print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def print_parts(parts: Sequence[RenderableType]) -> None:
    """Print tables and lines, as wide as the terminal."""
    from rich.console import Console  # takes a tenth of a second, and help does without

    console = Console()
    for part in parts:
        console.print(part)
