"""The command `bridge verify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from bridge.config import Document
from bridge.config.documents.folders import is_folder
from bridge.dist.checkpoint.folder import is_checkpoint
from bridge.dist.errors import CheckpointError, ComparisonError, LayoutError
from bridge.dist.loaders import check_weights
from bridge.dist.run.commands.options import SIZE, add_training_options, device_option, make_train_options
from bridge.dist.run.commands.output import print_notes, print_parts
from bridge.dist.run.devices import Device
from bridge.dist.run.splits import list_cases, select_cases
from bridge.dist.run.start import prepare


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option("--nproc", type=SIZE, default=4, show_default=True, help="Ranks to start on this machine.")
@click.option("--steps", type=SIZE, default=5, show_default=True, help="Training steps.")
@click.option(
    "--only",
    metavar="LAYOUT,...",
    help="Only these layouts of the table, such as 'tp2 sp,pp2'. 'tp2 with torch-fsdp2' is one wrapper.",
)
@click.option("--random-init", is_flag=True, help="With a folder as FILE: draw the weights instead of loading them.")
@device_option
@add_training_options
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def verify(
    file: str,
    overrides: tuple[str, ...],
    *,
    nproc: int,
    steps: int,
    only: str | None,
    random_init: bool,
    device: str,
    text: Path | None,
    global_batch_size: int,
    micro_batch_size: int,
    seq_length: int | None,
    as_json: bool,
) -> None:
    """Train FILE's model on one process and under many layouts, and compare the results.

    Each kind of parallelism is tried with each data-parallel wrapper, and in pairs. Losses, gradient norms and final
    weights must agree up to rounding. Exit code 1 if a layout differs or fails. Dropout is switched off, and the
    layout in FILE is ignored.

    If FILE is a Hugging Face folder, training starts from its weights, and under every layout the logits before the
    first step are compared with those of transformers.
    """
    try:
        cases = list_cases(nproc) if only is None else select_cases(nproc, [name.strip() for name in only.split(",")])
    except LayoutError as error:
        raise click.UsageError(str(error)) from error
    start_method = prepare(Device(device), None, ranks=nproc)
    document = Document.load(file, overrides)
    notes = document.migrate()
    print_notes(file, notes)
    weights = None
    if is_folder(document.source) and not random_init:
        weights = Path(document.source)
        if is_checkpoint(weights):
            raise CheckpointError(f"{file}: verify does not load Megatron checkpoints: add --random-init")
        print_notes(file, [note for note in check_weights(weights, is_file=True) if note not in notes])

    from bridge.dist.run import verify as verification
    from bridge.dist.run.progress import show_progress
    from bridge.dist.run.tables import render_verification

    config = document.config()
    training = make_train_options(config, steps, text, seq_length, global_batch_size, micro_batch_size, weights=weights)
    at_work = [f"{split.format_name(nproc)} with {wrapping}" for split, wrapping in cases]
    with TemporaryDirectory() as temporary:
        logits = None
        if weights is not None:
            logits = Path(temporary) / "logits.pt"
            try:
                verification.save_expected_logits(document, training, weights, samples=nproc, file=logits)
            except ComparisonError as error:
                logits = None
                click.echo(f"{file}: logits are not compared: {error}", err=True)
        found = verification.verify(
            document,
            training,
            world_size=nproc,
            cases=cases,
            start_method=start_method,
            weights=weights,
            logits=logits,
        )
        rows = list(
            show_progress(
                found,
                len(at_work),
                first="one process",
                describe=lambda done, _: at_work[done] if done < len(at_work) else "done",
            )
        )
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print_parts(render_verification(rows))
    if any(row.is_mismatch for row in rows):
        raise click.exceptions.Exit(1)
