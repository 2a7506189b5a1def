"""The commands `bridge build` and `bridge verify`. Importing this module imports no torch: `bridge -h` stays quick."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from bridge.config import Document, ModelConfig
from bridge.dist import launch
from bridge.dist.documents import apply_layout

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bridge.dist.report import BuildReport
    from bridge.dist.train import TrainOptions

CommandT = TypeVar("CommandT", bound=Callable[..., object])

_WRAPPERS = ("ddp", "megatron-fsdp", "torch-fsdp2", "none")
_LONGEST_DEFAULT_SAMPLE = 128
_SIZE = click.IntRange(min=1)


def _training_options(command: CommandT) -> CommandT:
    """Give a command the options that say what to train on."""
    for option in (
        click.option(
            "--seq-length",
            type=_SIZE,
            help=f"Tokens per sample; by default the model's, {_LONGEST_DEFAULT_SAMPLE} at most.",
        ),
        click.option("--micro-batch-size", type=_SIZE, default=1, show_default=True, help="Samples per forward pass."),
        click.option(
            "--global-batch-size", type=_SIZE, default=8, show_default=True, help="Samples per step, of all ranks."
        ),
        click.option(
            "--text", type=click.Path(path_type=Path), help="Text to train on, as bytes; by default a licence."
        ),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option(
    "--nproc", type=_SIZE, help="Start this many ranks here. Without it: the ranks of torchrun or srun, or 1."
)
@click.option("--tp", type=_SIZE, help="Tensor-parallel size.")
@click.option("--pp", type=_SIZE, help="Pipeline-parallel size.")
@click.option("--vp", type=_SIZE, help="Virtual pipeline stages per rank.")
@click.option("--cp", type=_SIZE, help="Context-parallel size.")
@click.option("--ep", type=_SIZE, help="Expert-parallel size.")
@click.option("--dp", type=_SIZE, help="Data-parallel size to insist on; it follows from the others.")
@click.option("--distributed-optimizer", is_flag=True, help="With ddp: shard the optimizer's state.")
@click.option("--wrap", type=click.Choice(_WRAPPERS), default="ddp", show_default=True, help="Data-parallel wrapper.")
@click.option("--steps", type=_SIZE, help="Train this many steps.")
@_training_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def build(
    file: str,
    overrides: tuple[str, ...],
    *,
    nproc: int | None,
    wrap: str,
    distributed_optimizer: bool,
    steps: int | None,
    text: Path | None,
    global_batch_size: int,
    micro_batch_size: int,
    seq_length: int | None,
    dp: int | None,
    as_json: bool,
    **sizes: int | None,
) -> None:
    """Build FILE, a document or a preset, as distributed stages, and train them for a few steps.

    The weights of a training run are drawn by parameter name and its global batch is the same under every layout, so
    that losses and gradient norms do not depend on the layout.
    """
    from bridge.dist import quiet as quiet  # for its effect

    document = Document.load(file, overrides)
    here = launch.rank_variables(os.environ) if nproc is None else {}
    os.environ.update(here)
    if not here:
        launch.start_fork_server(nproc or 1)
    notes = document.migrate()  # a layout is written into the present form
    if not here or here["RANK"] == "0":
        for note in notes:
            click.echo(f"{file}: note: {note}", err=True)
    apply_layout(document, {name: value for name, value in sizes.items() if value is not None})
    config = document.config()

    from bridge.dist import job as jobs
    from bridge.dist.options import Wrapper

    training = None
    if steps is not None:
        training = _train_options(config, steps, text, seq_length, global_batch_size, micro_batch_size)
    job = jobs.BuildJob(
        document=document.data,
        wrapper=Wrapper(wrap),
        distributed_optimizer=distributed_optimizer,
        dp=dp,
        training=training,
    )
    ranks = int(here["WORLD_SIZE"]) if here else nproc or 1
    job.check(config, ranks)
    if not here:
        jobs.check_devices(ranks)
    report = jobs.run_rank(job) if here else launch.launch(jobs.run_rank, job, ranks=ranks)
    assert report is not None  # torch's ``record`` returns None only for a function that called sys.exit
    if not here or here["RANK"] == "0":
        _show(report, as_json=as_json)


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option(
    "--nproc", type=_SIZE, default=4, show_default=True, help="Ranks to split the model over, on this machine."
)
@click.option("--steps", type=_SIZE, default=5, show_default=True, help="Steps to train.")
@_training_options
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def verify(
    file: str,
    overrides: tuple[str, ...],
    *,
    nproc: int,
    steps: int,
    text: Path | None,
    global_batch_size: int,
    micro_batch_size: int,
    seq_length: int | None,
    as_json: bool,
) -> None:
    """Train the model of FILE for the same few steps on one process and under many layouts, and compare.

    Each kind of parallelism is tried with each data-parallel wrapper, and in products. Losses, gradient norms and final
    weights must agree but for rounding; exit code 1 if any layout trains otherwise, or fails. Dropout is switched off,
    and the layout of FILE is left aside.
    """
    from bridge.dist import quiet as quiet  # for its effect

    document = Document.load(file, overrides)
    launch.start_fork_server(nproc)
    for note in document.migrate():
        click.echo(f"{file}: note: {note}", err=True)

    from bridge.dist import job as jobs
    from bridge.dist import verify as verification
    from bridge.dist.report import verification_tables, with_progress
    from bridge.dist.splits import cases

    jobs.check_devices(nproc)
    config = document.config()
    training = _train_options(config, steps, text, seq_length, global_batch_size, micro_batch_size)
    found = verification.verify(document, training, world_size=nproc)
    rows = list(
        with_progress(found, len(cases(nproc)), describe=lambda row: f"{row.layout}, {row.wrapper}: {row.verdict}")
    )
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _print(verification_tables(rows))
    if any(row.is_mismatch for row in rows):
        raise click.exceptions.Exit(1)


def _train_options(
    config: ModelConfig,
    steps: int,
    text: Path | None,
    seq_length: int | None,
    global_batch_size: int,
    micro_batch_size: int,
) -> TrainOptions:
    from bridge.dist.text import default_text
    from bridge.dist.train import TrainOptions

    longest = min(getattr(config, "seq_length", _LONGEST_DEFAULT_SAMPLE), _LONGEST_DEFAULT_SAMPLE)
    return TrainOptions(
        steps=steps,
        text=text or default_text(),
        seq_length=seq_length or longest,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
    )


def _show(report: BuildReport, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
        return
    from bridge.dist.report import tables

    _print(tables(report))


def _print(parts: Sequence[RenderableType]) -> None:
    from rich.console import Console

    console = Console()
    for part in parts:
        console.print(part)
