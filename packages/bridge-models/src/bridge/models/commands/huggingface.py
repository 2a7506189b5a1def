"""`bridge from-hf` and `bridge to-hf`.

What reads documents is imported when a command runs: it takes as long as all else that `bridge --help` loads.
"""

from __future__ import annotations

from pathlib import Path

import click

from bridge.config.errors import ConfigError


@click.command()
@click.argument("source", metavar="CONFIG_JSON")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the document to this .yaml, .yml or .json file."
)
@click.option("--force", is_flag=True, help="Overwrite the file.")
@click.option("--model-id", help="The model's name on Hugging Face, kept in hf_model_id, in place of _name_or_path.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def from_hf(*, source: str, output: Path | None, force: bool, model_id: str | None, as_json: bool) -> None:
    """Make a document from a config.json of transformers.

    CONFIG_JSON is the file, a folder with a config.json, or - for standard input; nothing is fetched. What a document
    cannot say is refused, all of it at once, by the names of its fields.
    """
    from bridge.config.documents.document import Document
    from bridge.models import huggingface

    _check_free(output, force=force)
    given = huggingface.load_config_json(source)
    with given.placing_problems():
        converted = huggingface.from_hf(given.data, model_id=model_id)
    _tell(given.source, converted.notes)
    document = Document(converted.data)
    if output is not None:
        before = set(output.parent.glob("*.schema.json"))
        document.save(output)
        for schema in set(output.parent.glob("*.schema.json")) - before:
            click.echo(f"{schema}: the JSON Schema that {output.name} names, for editors; it may be removed", err=True)
    else:
        click.echo(document.to_json() if as_json else document.to_yaml().rstrip("\n"))


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write it to this .json file, or into this folder."
)
@click.option("--force", is_flag=True, help="Overwrite the file.")
def to_hf(*, file: str, overrides: tuple[str, ...], output: Path | None, force: bool) -> None:
    """Print the config.json of the model that a document describes, as versions 4 and 5 of transformers read it.

    FILE is a .yaml, .yml or .json file, the name of a preset, or - for standard input. PATH=VALUE overrides a value,
    ~PATH removes one. What a config.json cannot say is refused, all of it at once, by the paths of its fields.
    """
    from bridge.config.documents.document import Document
    from bridge.models import huggingface

    if output is not None:
        output = output / "config.json" if output.is_dir() else output
        if output.suffix != ".json":
            raise ConfigError(f"{output}: give a .json file, or a folder to put config.json into")
        _check_free(output, force=force)
    document = Document.load(file, overrides)
    with document.placing_problems():
        converted = huggingface.to_hf(document.data)
    _tell(file, converted.notes)
    written = Document(converted.data)
    if output is not None:
        written.save(output)
    else:
        click.echo(written.to_json())


def _check_free(output: Path | None, *, force: bool) -> None:
    if output is not None and output.exists() and not force:
        raise ConfigError(f"{output}: there is such a file: give --force to overwrite it, or another name")


def _tell(source: str, notes: list[str]) -> None:
    for note in notes:
        click.echo(f"{source}: note: {note}", err=True)
