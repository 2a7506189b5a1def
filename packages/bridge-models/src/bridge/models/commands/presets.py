"""`bridge presets`."""

from __future__ import annotations

from importlib.resources.abc import Traversable

import click

from bridge.config.cli.output import print_json
from bridge.config.documents.presets import list_presets


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object of names and descriptions.")
def presets(*, as_json: bool) -> None:
    """List the presets: documents of known models, which can be named wherever a command takes a FILE."""
    described = {name: _read_description(file) for name, file in list_presets().items()}
    if as_json:
        print_json(described)
        return
    from rich.console import Console  # takes 0.1 s, which would slow `bridge --help`
    from rich.table import Table

    table = Table("preset", "description", box=None)
    for name, description in described.items():
        table.add_row(name, description)
    Console().print(table, markup=False)


def _read_description(preset: Traversable) -> str:
    """Return the comment in a preset's first line; empty if there is none."""
    first, _, _ = preset.read_text(encoding="utf-8").partition("\n")
    return first.removeprefix("#").strip() if first.startswith("#") else ""
