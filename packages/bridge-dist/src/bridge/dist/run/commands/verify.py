"""The command `bridge verify`."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from bridge.config import Document
from bridge.config.cli.output import print_written
from bridge.dist.checkpoint.folder import check_save_folder
from bridge.dist.checks.document import refuse_before_imports
from bridge.dist.document_layout import replace_layout
from bridge.dist.errors import ComparisonError, LayoutError
from bridge.dist.fusions import choose_fusions
from bridge.dist.run.commands.inputs import read_inputs
from bridge.dist.run.commands.options import (
    LOCAL_RANKS,
    SIZE,
    add_origin_options,
    add_training_options,
    check_batch,
    device_option,
    make_train_options,
)
from bridge.dist.run.commands.output import print_parts
from bridge.dist.run.devices import Device
from bridge.dist.run.origin import choose_origin
from bridge.dist.run.splits import list_cases, select_cases
from bridge.dist.run.start import prepare
from bridge.dist.wrapper import Wrapper


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option("--nproc", type=LOCAL_RANKS, default=4, show_default=True, help="Ranks to start on this machine.")
@click.option("--steps", type=SIZE, default=5, show_default=True, help="Training steps.")
@click.option(
    "--only",
    metavar="LAYOUT,...",
    help="Only these layouts of the table, such as 'tp2 sp,pp2'. 'tp2 with torch-fsdp2' is one wrapper.",
)
@add_origin_options
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    help="Save what one process trained as a Megatron checkpoint in this folder, which must be new.",
)
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
    load: Path | None,
    save: Path | None,
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

    If FILE or --load is a Hugging Face folder, training starts from its weights, and under every layout the logits
    before the first step are compared with those of transformers. If it is a Megatron checkpoint, training goes on from
    it under every layout: with its optimizer, and where its text stopped.
    """
    try:
        cases = list_cases(nproc) if only is None else select_cases(nproc, [name.strip() for name in only.split(",")])
    except LayoutError as error:
        raise click.UsageError(str(error)) from error
    inputs = read_inputs(file, overrides, load, random_init=random_init)
    document = inputs.document
    _check_on_one_rank(document, seq_length, global_batch_size, micro_batch_size)
    origin = choose_origin(document, inputs.load, random_init=random_init)
    if save is not None:
        check_save_folder(save, None)
    start_method = prepare(Device(device), None, ranks=nproc)
    inputs.check_weights(origin)

    from megatron.core.extensions.transformer_engine import HAVE_TE

    from bridge.dist.run import verify as verification
    from bridge.dist.run.progress import show_progress
    from bridge.dist.run.tables import render_verification

    if HAVE_TE:
        choose_fusions(document)  # what is verified is what `bridge build` builds
    config = document.config()
    training = make_train_options(config, steps, text, seq_length, global_batch_size, micro_batch_size, origin=origin)
    at_work = [f"{split.format_name(nproc)} with {wrapping}" for split, wrapping in cases]
    with TemporaryDirectory() as temporary:
        logits = None
        if (weights := origin.weights) is not None:
            logits = Path(temporary) / "logits.pt"
            try:
                verification.save_expected_logits(document, training, weights, samples=nproc, file=logits)
            except ComparisonError as error:
                logits = None
                click.echo(f"{file}: logits are not compared: {error}", err=True)
        rows_found = verification.verify(
            document,
            training,
            world_size=nproc,
            cases=cases,
            start_method=start_method,
            origin=origin,
            logits=logits,
            save=save,
        )
        rows = list(
            show_progress(
                rows_found,
                len(at_work),
                first="one process",
                describe=lambda done, _: at_work[done] if done < len(at_work) else "done",
            )
        )
    if save is not None:
        print_written(save)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print_parts(render_verification(rows))
    if any(row.is_mismatch for row in rows):
        raise click.exceptions.Exit(1)


def _check_on_one_rank(
    document: Document, seq_length: int | None, global_batch_size: int, micro_batch_size: int
) -> None:
    """Refuse early what one process could not train: no layout would have anything to be compared with."""
    alone = deepcopy(document)
    replace_layout(alone, {}, sequence_parallel=False)
    setup = refuse_before_imports(alone, wrapper=Wrapper.DDP, world_size=1)
    if setup is not None:
        check_batch(
            setup, seq_length=seq_length, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size
        )
