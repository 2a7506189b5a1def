"""The command `bridge compare`."""

from __future__ import annotations

import json
import os

import click

from bridge.dist.run.commands.output import print_parts


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare(files: tuple[str, ...], *, as_json: bool) -> None:
    """Print build reports and plans side by side, and by how much each differs from the first.

    FILE is what `bridge build --json` or `bridge plan --json` printed. A build report alone is compared with the plan
    of the same job, which is made. Memory is that of the rank that holds most.
    """
    if len(files) == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a plan takes none

    from bridge.dist.run import compare as comparing  # rich, which other commands do without

    found = comparing.compare(files)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
    else:
        print_parts(comparing.render_comparison(found))
