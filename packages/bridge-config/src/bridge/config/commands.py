"""The commands of bridge-config: `bridge validate` and `bridge show`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from bridge.config.errors import DocumentError

if TYPE_CHECKING:
    from bridge.config.errors import Problem


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE... [PATH=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print the verdicts as JSON.")
@click.pass_context
def validate(ctx: click.Context, files: tuple[str, ...], as_json: bool) -> None:
    """Check documents: every problem with its file, line, column and path.

    FILE is a .yaml, .yml or .json file or the name of a preset. PATH=VALUE overrides a value in each of them, ~PATH
    removes one.
    """
    sources, overrides = _split(files)
    verdicts = {source: _problems(source, overrides) for source in sources}
    for source, problems in verdicts.items():
        if not as_json:
            for problem in problems:
                click.echo(str(problem), err=True)
            if not problems:
                click.echo(f"{source}: ok")
    if as_json:
        import json

        entries = [
            {"source": source, "ok": not problems, "problems": [dataclasses.asdict(problem) for problem in problems]}
            for source, problems in verdicts.items()
        ]
        click.echo(json.dumps(entries, indent=2))
    if any(verdicts.values()):
        ctx.exit(1)


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of YAML.")
def show(file: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print a document with overrides applied, without checking it.

    FILE is a .yaml, .yml or .json file or the name of a preset. PATH=VALUE overrides a value, ~PATH removes one.
    """
    from bridge.config.document import Document

    document = Document.load(file, overrides)
    click.echo(document.to_json() if as_json else document.to_yaml().rstrip("\n"))


def _split(arguments: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Files and overrides, in order."""
    from bridge.config.document import is_override

    overrides = [argument for argument in arguments if is_override(argument)]
    sources = [argument for argument in arguments if not is_override(argument)]
    if not sources:
        raise click.UsageError("name at least one FILE")
    return sources, overrides


def _problems(source: str, overrides: list[str]) -> list[Problem]:
    from bridge.config.document import load_config

    try:
        load_config(source, overrides)
    except DocumentError as error:
        return error.problems
    return []
