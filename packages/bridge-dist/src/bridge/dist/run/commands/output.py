"""Printing of tables, lines and notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import RenderableType


def print_notes(source: str | Path, notes: Iterable[str]) -> None:
    """Print notes about a file or folder to standard error."""
    for note in notes:
        click.echo(f"{source}: note: {note}", err=True)


def print_parts(parts: Sequence[RenderableType]) -> None:
    """Print tables and lines, as wide as the terminal."""
    from rich.console import Console  # takes 0.1 s, which `bridge -h` must not wait for

    console = Console()
    for part in parts:
        console.print(part)
