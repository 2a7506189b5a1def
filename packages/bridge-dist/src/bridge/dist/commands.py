"""The command `bridge build`. Importing this module imports no torch, so that `bridge --help` stays quick."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge.config import Document
from bridge.dist import launch
from bridge.dist.documents import apply_layout

if TYPE_CHECKING:
    from bridge.dist.report import BuildReport

_WRAPPERS = ("ddp", "megatron-fsdp", "torch-fsdp2", "none")
_LONGEST_DEFAULT_SAMPLE = 128
_SIZE = click.IntRange(min=1)


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option("--nproc", type=_SIZE, help="Start this many ranks here. Without it: the ranks of torchrun or srun, or 1.")
@click.option("--tp", type=_SIZE, help="Tensor-parallel size.")
@click.option("--pp", type=_SIZE, help="Pipeline-parallel size.")
@click.option("--vp", type=_SIZE, help="Virtual pipeline stages per rank.")
@click.option("--cp", type=_SIZE, help="Context-parallel size.")
@click.option("--ep", type=_SIZE, help="Expert-parallel size.")
@click.option("--dp", type=_SIZE, help="Data-parallel size to insist on; it follows from the others.")
@click.option("--wrap", type=click.Choice(_WRAPPERS), default="ddp", show_default=True, help="Data-parallel wrapper.")
@click.option("--steps", type=_SIZE, help="Train this many steps.")
@click.option("--text", type=click.Path(path_type=Path), help="Text to train on, as bytes; by default a licence.")
@click.option("--global-batch-size", type=_SIZE, default=8, show_default=True, help="Samples per step, of all ranks.")
@click.option("--micro-batch-size", type=_SIZE, default=1, show_default=True, help="Samples per forward pass.")
@click.option(
    "--seq-length", type=_SIZE, help=f"Tokens per sample; by default the model's, {_LONGEST_DEFAULT_SAMPLE} at most."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def build(
    file: str,
    overrides: tuple[str, ...],
    *,
    nproc: int | None,
    wrap: str,
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
    from bridge.dist.text import default_text
    from bridge.dist.train import TrainOptions

    training = None
    if steps is not None:
        longest = min(getattr(config, "seq_length", _LONGEST_DEFAULT_SAMPLE), _LONGEST_DEFAULT_SAMPLE)
        training = TrainOptions(
            steps=steps,
            text=text or default_text(),
            seq_length=seq_length or longest,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
        )
    job = jobs.BuildJob(document=document.data, wrapper=Wrapper(wrap), dp=dp, training=training)
    ranks = int(here["WORLD_SIZE"]) if here else nproc or 1
    job.check(config, ranks)
    if not here:
        jobs.check_devices(ranks)
    report = jobs.run_rank(job) if here else launch.launch(jobs.run_rank, job, ranks=ranks)
    assert report is not None  # torch's ``record`` returns None only for a function that called sys.exit
    if not here or here["RANK"] == "0":
        _show(report, as_json=as_json)


def _show(report: BuildReport, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
        return
    from rich.console import Console

    from bridge.dist.report import tables

    console = Console()
    for part in tables(report):
        console.print(part)
