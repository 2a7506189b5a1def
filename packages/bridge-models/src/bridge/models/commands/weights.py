"""`bridge check-hf`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bridge.config.cli.output import print_json, print_notes
from bridge.config.errors import DocumentError
from bridge.dist.run.commands.options import SIZE, add_size_options
from bridge.models.errors import WeightsError

if TYPE_CHECKING:
    from bridge.models.huggingface.folder.folder import Folder
    from bridge.models.huggingface.folder.summary import Summary
    from bridge.models.huggingface.transfer.reads import Reads


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@add_size_options
@click.option("--gpus", type=SIZE, help="Total number of ranks; by default as many as the layout needs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all problems.")
def check_hf(*, folder: Path, overrides: tuple[str, ...], gpus: int | None, as_json: bool, **sizes: int | None) -> None:
    """Check that the weights of a Hugging Face folder are those of the model that its config.json describes.

    FOLDER holds config.json and safetensors files, or is a repository in the Hugging Face cache (org/name). Only the
    headers of the files are read. Every tensor that is missing, unknown, of another shape, or stored in a way that is
    not read is a problem; exit code 1 if there is any.

    With a layout, the report adds how many bytes each rank reads when it loads the folder. PATH=VALUE changes the
    document, such as the layers of each pipeline stage.
    """
    from bridge.models.huggingface.folder.folder import open_folder  # imports documents, which slow `bridge --help`
    from bridge.models.huggingface.folder.summary import summarize

    given = {axis: size for axis, size in sizes.items() if size is not None}
    try:
        opened = open_folder(folder)
        reads = _count_reads(opened, overrides, given, gpus) if given or gpus or overrides else None
    except (DocumentError, WeightsError) as error:
        if not as_json:
            raise
        print_json({"folder": str(folder), "ok": False, "problems": [asdict(problem) for problem in error.problems]})
        raise click.exceptions.Exit(1) from error
    found = summarize(opened)
    if as_json:
        report = {"folder": str(folder), "ok": True, **asdict(found), "notes": opened.notes}
        if reads is not None:
            report["reads"] = [asdict(one) for one in reads]
        print_json(report)
        return
    print_notes(folder, opened.notes)
    click.echo(f"{folder}: ok")
    _print_summary(found)
    if reads is not None:
        _print_reads(reads)


def _count_reads(folder: Folder, overrides: Sequence[str], sizes: dict[str, int], gpus: int | None) -> list[Reads]:
    """Count the bytes that each rank reads. Imports megatron-core, which builds the stages."""
    from bridge.config import Document
    from bridge.dist.checks.document import refuse_before_imports
    from bridge.dist.document_layout import apply_layout
    from bridge.dist.process.imports import import_megatron
    from bridge.dist.run.devices import hide_gpus
    from bridge.dist.wrapper import Wrapper

    hide_gpus()
    document = Document(folder.document)
    document.override(overrides)
    apply_layout(document, sizes)
    refuse_before_imports(document, wrapper=Wrapper.DDP, world_size=gpus)
    import_megatron(with_compiler=False)
    from bridge.models.huggingface.transfer.reads import count_reads

    return count_reads(folder, document, gpus)


def _print_summary(found: Summary) -> None:
    click.echo(f"{found.model_type}, {found.parameters:,} parameters")
    click.echo(f"{found.tensors:,} tensors in {found.files:,} file(s), {found.bytes:,} bytes")
    for dtype, precision in found.precisions.items():
        click.echo(f"{dtype:8} {precision.tensors:>7,} tensors, {precision.bytes:,} bytes")


def _print_reads(reads: Sequence[Reads]) -> None:
    click.echo(f"{'pipeline rank':>13} {'ranks':>7} {'first':>7} {'bytes read by each':>20}")
    for one in reads:
        click.echo(f"{one.pp:>13} {len(one.ranks):>7,} {one.ranks[0]:>7} {one.bytes:>20,}")
