"""The command `bridge compare`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from bridge.config.cli.output import write_output
from bridge.dist.run.commands.options import add_html_option
from bridge.dist.run.commands.output import print_parts


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@add_html_option
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare(files: tuple[str, ...], *, html: Path | None, as_json: bool) -> None:
    """Print build reports and plans side by side, with their differences from the first.

    FILE is the output of `bridge build --json` or `bridge plan --json`. A single build report is compared with a plan
    of the same job, which this command makes. Memory is that of the rank with the highest peak. The page shows plans
    side by side.
    """
    if files.count("-") > 1:
        raise click.UsageError("standard input (-) can be read only once: name a file")
    if len(files) == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # planning uses no GPU

    from bridge.dist.run import compare as comparing  # imports rich, which `bridge -h` must not wait for

    found = comparing.compare(files)
    if html is not None:
        from bridge.dist.run.comparison_page import render_comparison_page  # imports bokeh, which takes a second

        write_output(render_comparison_page(found), html)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
    else:
        print_parts(comparing.render_comparison(found))
