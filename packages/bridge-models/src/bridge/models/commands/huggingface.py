"""`bridge from-hf` and `bridge to-hf`.

Document is imported when a command runs: importing it takes as long as everything else that `bridge --help` loads.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from bridge.config.cli.output import check_output, print_notes, print_written
from bridge.config.errors import ConfigError


@click.command()
@click.argument("source", metavar="CONFIG_JSON")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the document to this .yaml, .yml or .json file."
)
@click.option("--force", is_flag=True, help="Overwrite the file.")
@click.option("--model-id", help="The model's name on Hugging Face, kept in hf_model_id; overrides _name_or_path.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def from_hf(*, source: str, output: Path | None, force: bool, model_id: str | None, as_json: bool) -> None:
    """Convert a config.json of transformers to a document.

    CONFIG_JSON is the file, a folder with a config.json, a repository in the Hugging Face cache (org/name), or - for
    standard input; nothing is downloaded. Fields that a document cannot express are errors, all reported at once by
    name.
    """
    from bridge.config.documents.document import Document
    from bridge.models import huggingface

    check_output(output, force=force)
    given = huggingface.load_config_json(source)
    with given.locate_problems():
        converted = huggingface.from_hf(given.data, model_id=model_id)
    print_notes(given.source, converted.notes)
    document = Document(converted.data)
    if output is not None:
        # Saving a YAML document may write its JSON Schema beside it.
        before = set(output.parent.glob("*.schema.json"))
        document.save(output)
        print_written(output)
        for schema in set(output.parent.glob("*.schema.json")) - before:
            click.echo(f"{schema}: JSON Schema of {output.name}, for editors; you may delete it", err=True)
    else:
        click.echo(document.to_json() if as_json else document.to_yaml().rstrip("\n"))


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write to this .json file, or to config.json in this folder.",
)
@click.option("--force", is_flag=True, help="Overwrite the file.")
def to_hf(*, file: str, overrides: tuple[str, ...], output: Path | None, force: bool) -> None:
    """Convert a document to a config.json for versions 4 and 5 of transformers, and print it.

    FILE is a .yaml, .yml or .json file, the name of a preset, a Hugging Face folder, or - for standard input.
    PATH=VALUE overrides a value, ~PATH removes one. Fields that a config.json cannot express are errors, all reported
    at once by path.
    """
    from bridge.config.documents.document import Document
    from bridge.models import huggingface

    if output is not None:
        output = output / "config.json" if os.path.isdir(output) else output  # unlike Path, it accepts every name
        if output.suffix != ".json":
            raise ConfigError(f"{output}: expected a .json file, or a folder for config.json")
        check_output(output, force=force)
    document = Document.load(file, overrides)
    with document.locate_problems():
        converted = huggingface.to_hf(document.data)
    print_notes(file, converted.notes)
    written = Document(converted.data)
    if output is not None:
        written.save(output)
        print_written(output)
    else:
        click.echo(written.to_json())
