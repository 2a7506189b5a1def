"""`bridge check-hf`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from bridge.config.errors import DocumentError
from bridge.models.errors import WeightsError


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all problems.")
def check_hf(*, folder: Path, as_json: bool) -> None:
    """Check that the weights of a Hugging Face folder are those of the model that its config.json describes.

    FOLDER holds config.json and safetensors files. Only the headers of the files are read. Every tensor that is
    missing, unknown, of another shape, or stored in a way that is not read is a problem; exit code 1 if there is any.
    """
    from bridge.models.huggingface.folder.folder import open_folder  # imports documents, which slow `bridge --help`
    from bridge.models.huggingface.folder.summary import summarize

    try:
        opened = open_folder(folder)
    except (DocumentError, WeightsError) as error:
        if not as_json:
            raise
        problems = [asdict(problem) for problem in error.problems]
        click.echo(json.dumps({"folder": str(folder), "ok": False, "problems": problems}, indent=2, ensure_ascii=False))
        raise click.exceptions.Exit(1) from error
    found = summarize(opened)
    if as_json:
        report = {"folder": str(folder), "ok": True, **asdict(found), "notes": opened.notes}
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    for note in opened.notes:
        click.echo(f"{folder}: note: {note}", err=True)
    click.echo(f"{folder}: ok")
    click.echo(f"{found.model_type}, {found.parameters:,} parameters")
    click.echo(f"{found.tensors:,} tensors in {found.files:,} file(s), {found.bytes:,} bytes")
    for dtype, precision in found.precisions.items():
        click.echo(f"{dtype:8} {precision.tensors:>7,} tensors, {precision.bytes:,} bytes")
