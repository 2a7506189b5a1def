"""The command `bridge build`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bridge.config import BridgeError, Document
from bridge.config.documents.folders import is_folder
from bridge.config.documents.sources import STANDARD_INPUT
from bridge.config.tracebacks import format_error
from bridge.dist.checkpoint.folder import is_checkpoint
from bridge.dist.checks.document import refuse_before_imports
from bridge.dist.document_layout import apply_layout
from bridge.dist.loaders import check_weights
from bridge.dist.run.commands.options import SIZE, WRAPPERS, add_training_options, device_option, make_train_options
from bridge.dist.run.commands.output import print_notes, print_parts
from bridge.dist.run.devices import Device
from bridge.dist.run.pool import launch
from bridge.dist.run.rank_environment import RankEnvironment
from bridge.dist.run.start import prepare
from bridge.dist.wrapper import Wrapper

if TYPE_CHECKING:
    from bridge.dist.run.report import BuildReport


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option("--nproc", type=SIZE, help="Ranks to start here; by default the ranks of torchrun or srun, else 1.")
@click.option("--tp", type=SIZE, help="Tensor-parallel size.")
@click.option("--pp", type=SIZE, help="Pipeline-parallel size.")
@click.option("--vp", type=SIZE, help="Virtual pipeline stages per rank.")
@click.option("--cp", type=SIZE, help="Context-parallel size.")
@click.option("--ep", type=SIZE, help="Expert-parallel size.")
@click.option("--etp", type=SIZE, help="Expert-tensor-parallel size; by default the value of --tp.")
@click.option("--dp", type=SIZE, help="Expected data-parallel size; an error if the other sizes give another.")
@click.option("--distributed-optimizer", is_flag=True, help="With ddp: shard the optimizer state.")
@click.option("--wrap", type=click.Choice(WRAPPERS), default="ddp", show_default=True, help="Data-parallel wrapper.")
@click.option("--steps", type=SIZE, help="Train this many steps.")
@click.option(
    "--load",
    type=click.Path(path_type=Path),
    help="Load the weights of this Hugging Face folder, or go on from this Megatron checkpoint. With "
    "restore_modelopt_state: restore the weights and the ModelOpt state of this checkpoint.",
)
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    help="Save the model, and with --steps optimizer and random states, as a Megatron checkpoint in this folder.",
)
@click.option("--random-init", is_flag=True, help="With a folder as FILE: draw the weights instead of loading them.")
@device_option
@add_training_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def build(
    file: str,
    overrides: tuple[str, ...],
    *,
    nproc: int | None,
    wrap: str,
    distributed_optimizer: bool,
    steps: int | None,
    load: Path | None,
    save: Path | None,
    random_init: bool,
    device: str,
    text: Path | None,
    global_batch_size: int,
    micro_batch_size: int,
    seq_length: int | None,
    dp: int | None,
    as_json: bool,
    **sizes: int | None,
) -> None:
    """Build FILE's model as distributed stages; with --steps train them.

    FILE is a document, the name of a preset, a Hugging Face folder, a Megatron checkpoint, or - for standard input.

    Initial weights depend on the parameter's name only, and the global batch is the same under every layout: losses and
    gradient norms do not depend on the layout. If FILE is a folder, its weights are loaded. With --load of a checkpoint
    that --save or Megatron-LM wrote, training goes on where it stopped, under any layout.
    """
    place = RankEnvironment.read(os.environ) if nproc is None else None
    if file == STANDARD_INPUT and place is not None:
        raise click.UsageError("ranks started by torchrun or srun cannot share standard input: pass a file name")
    if load is not None and random_init:
        raise click.UsageError("--load and --random-init exclude each other: give one of them")
    is_leader = place is None or place.rank == 0
    with _report_errors(place):
        document = Document.load(file, overrides)
        notes = document.migrate()  # before the layout is written in the current form
        if is_leader:
            print_notes(file, notes)
        apply_layout(document, {name: value for name, value in sizes.items() if value is not None})
        ranks = (nproc or 1) if place is None else place.world_size
        refuse_before_imports(
            document,
            wrapper=Wrapper(wrap),
            world_size=ranks,
            dp=dp,
            distributed_optimizer=distributed_optimizer,
        )
        checkpoint = _choose_checkpoint(document, load, random_init=random_init)
        weights = None if checkpoint else _choose_weights(document, load, random_init=random_init)
        if weights is not None:
            found = check_weights(weights, is_file=load is None)
            if is_leader:
                print_notes(weights, [note for note in found if note not in notes])
        start_method = prepare(Device(device), place, ranks=nproc or 1)
        config = document.config()

        from bridge.dist.job import BuildJob
        from bridge.dist.run.rank import run_rank

        training = None
        if steps is not None:
            training = make_train_options(
                config, steps, text, seq_length, global_batch_size, micro_batch_size, weights=weights
            )
        job = BuildJob(
            document=document.data,
            overrides=overrides,
            wrapper=Wrapper(wrap),
            distributed_optimizer=distributed_optimizer,
            dp=dp,
            training=training,
            modelopt_checkpoint=None if weights or checkpoint else load,
            weights=weights,
            checkpoint=checkpoint,
            save=save,
        )
        job.check(config, ranks)
        job.make_builder(config).check_restore()
        report = run_rank(job) if place else launch(run_rank, job, ranks=ranks, start_method=start_method)
    if is_leader:
        _print_report(report, as_json=as_json)


def _choose_checkpoint(document: Document, load: Path | None, *, random_init: bool) -> Path | None:
    """Return the Megatron checkpoint to go on from: that of --load, or FILE; None if it is neither."""
    source = load
    if source is None and is_folder(document.source) and not random_init:
        source = Path(document.source)
    if source is None or document.data.get("restore_modelopt_state") or not is_checkpoint(source):
        return None
    return source


def _choose_weights(document: Document, load: Path | None, *, random_init: bool) -> Path | None:
    """Return the folder to load the weights of; None to draw them, or to restore them with a ModelOpt state."""
    if load is not None:
        return None if document.data.get("restore_modelopt_state") else load
    return Path(document.source) if is_folder(document.source) and not random_init else None


@contextlib.contextmanager
def _report_errors(place: RankEnvironment | None) -> Iterator[None]:
    """Print an error only once if every rank of a launcher finds it, and record it for torchrun."""
    if place is None:
        yield
        return
    from bridge.dist.run import failure_detection  # imports torch, which `bridge -h` must not wait for

    failure_detection.die_with_launcher()
    try:
        with failure_detection.exit_on_signals(place), failure_detection.watch_nodes(place):
            yield
    except Exception as error:
        failure_detection.record_for_launcher(error)
        if failure_detection.is_first_to_print(
            str(error) if isinstance(error, BridgeError) else format_error(error), place
        ):
            raise
        raise click.exceptions.Exit(1) from None


def _print_report(report: BuildReport, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
        return
    from bridge.dist.run.tables import render_report

    print_parts(render_report(report))
