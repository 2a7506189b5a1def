"""The commands `bridge build`, `bridge verify`, `bridge plan` and `bridge compare`.

Importing this module imports no torch: `bridge -h` stays quick.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import click

from bridge.config import BridgeError, Document, ModelConfig
from bridge.config.document import STANDARD_INPUT
from bridge.config.frames import describe
from bridge.dist.checks.document import refuse_before_imports
from bridge.dist.documents import apply_layout, replace_layout
from bridge.dist.imports import import_megatron
from bridge.dist.messages import start_run
from bridge.dist.run.devices import Device, choose_device, count_gpus, hide_gpus
from bridge.dist.run.pool import StartMethod, launch, start_fork_server
from bridge.dist.run.rank_environment import RankEnvironment
from bridge.dist.wrapper import Wrapper

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bridge.dist.plan.plan import PlanOptions
    from bridge.dist.plan.search import Machine
    from bridge.dist.report import BuildReport
    from bridge.dist.train import TrainOptions

CommandT = TypeVar("CommandT", bound=Callable[..., object])

_WRAPPERS = ("ddp", "megatron-fsdp", "torch-fsdp2", "none")
_LONGEST_DEFAULT_SAMPLE = 128
_SIZE = click.IntRange(min=1)
_ABOVE_ZERO = click.FloatRange(0, min_open=True)


_device_option = click.option(
    "--device",
    type=click.Choice([device.value for device in Device]),
    default=Device.AUTO.value,
    show_default=True,
    help="What ranks compute on; auto: a GPU for each rank of a machine where there are enough, else the CPU.",
)


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
@click.option("--etp", type=_SIZE, help="Expert-tensor-parallel size; by default that of --tp.")
@click.option("--dp", type=_SIZE, help="Data-parallel size to insist on; it follows from the others.")
@click.option("--distributed-optimizer", is_flag=True, help="With ddp: shard the optimizer's state.")
@click.option("--wrap", type=click.Choice(_WRAPPERS), default="ddp", show_default=True, help="Data-parallel wrapper.")
@click.option("--steps", type=_SIZE, help="Train this many steps.")
@click.option(
    "--load",
    type=click.Path(path_type=Path),
    help="With restore_modelopt_state: the checkpoint to restore the ModelOpt state and the weights from.",
)
@_device_option
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
    load: Path | None,
    device: str,
    text: Path | None,
    global_batch_size: int,
    micro_batch_size: int,
    seq_length: int | None,
    dp: int | None,
    as_json: bool,
    **sizes: int | None,
) -> None:
    """Build FILE, a document, a preset or - for standard input, as distributed stages, and train them for a few steps.

    The weights of a training run are drawn by parameter name and its global batch is the same under every layout, so
    that losses and gradient norms do not depend on the layout. With --load they are the checkpoint's.
    """
    place = RankEnvironment.read(os.environ) if nproc is None else None
    if file == STANDARD_INPUT and place is not None:
        raise click.UsageError("the ranks of a launcher cannot all read standard input: name a file")
    with _reporting_errors(place):
        document = Document.load(file, overrides)
        notes = document.migrate()  # a layout is written into the present form
        if place is None or place.rank == 0:
            for note in notes:
                click.echo(f"{file}: note: {note}", err=True)
        apply_layout(document, {name: value for name, value in sizes.items() if value is not None})
        ranks = (nproc or 1) if place is None else place.world_size
        refuse_before_imports(
            document,
            wrapper=Wrapper(wrap),
            world_size=ranks,
            dp=dp,
            distributed_optimizer=distributed_optimizer,
        )
        start_method = _prepare(Device(device), place, ranks=nproc or 1)
        config = document.config()

        from bridge.dist import job as jobs

        training = None
        if steps is not None:
            training = _train_options(config, steps, text, seq_length, global_batch_size, micro_batch_size)
        job = jobs.BuildJob(
            document=document.data,
            overrides=overrides,
            wrapper=Wrapper(wrap),
            distributed_optimizer=distributed_optimizer,
            dp=dp,
            training=training,
            modelopt_checkpoint=load,
        )
        job.check(config, ranks)
        job.builder(config).check_restore()
        if place is None:
            report = launch(jobs.run_rank, job, ranks=ranks, start_method=start_method)
        else:
            report = jobs.run_rank(job)
    if place is None or place.rank == 0:
        _show(report, as_json=as_json)


def _prepare(asked: Device, place: RankEnvironment | None, *, ranks: int) -> StartMethod:
    """Choose the device, in this process and those it starts, and import megatron-core for it.

    Args:
        asked: What the user asks for.
        place: This process's among the ranks of a launcher; None if it starts them itself.
        ranks: How many it starts.

    Returns:
        How ranks are started that compute on the device.

    Raises:
        LaunchError: There is no GPU for each rank of this machine, and the user asks for it.
    """
    start_run()
    if place is not None:
        os.environ.update(place.variables())  # as libraries look for them, under srun too
    local_ranks = ranks if place is None else place.local_world_size
    device = choose_device(asked, local_ranks=local_ranks)
    if device is Device.CUDA:
        import_megatron(with_compiler=place is not None)  # the process that starts ranks computes nothing
        return "spawn"
    if asked is Device.AUTO and (gpus := count_gpus()) and (place is None or place.rank == 0):
        click.echo(f"{local_ranks} ranks, {gpus} GPU(s): computing on the CPU", err=True)
    hide_gpus()
    if place is None:
        start_fork_server(ranks)
    import_megatron(with_compiler=False)
    return "forkserver"


@contextlib.contextmanager
def _reporting_errors(place: RankEnvironment | None) -> Iterator[None]:
    """Among the ranks of a launcher: print an error that each of them finds once, and leave it for torchrun to find."""
    if place is None:
        yield
        return
    from bridge.dist.run import failures  # and torch, which `bridge -h` does without

    failures.end_with_launcher()
    try:
        with failures.ended_by_signals(place), failures.watching_nodes(place):
            yield
    except Exception as error:
        failures.record_for_launcher(error)
        if failures.say_once(str(error) if isinstance(error, BridgeError) else describe(error), place):
            raise
        raise click.exceptions.Exit(1) from None


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option(
    "--nproc", type=_SIZE, default=4, show_default=True, help="Ranks to split the model over, on this machine."
)
@click.option("--steps", type=_SIZE, default=5, show_default=True, help="Steps to train.")
@_device_option
@_training_options
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def verify(
    file: str,
    overrides: tuple[str, ...],
    *,
    nproc: int,
    steps: int,
    device: str,
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
    start_method = _prepare(Device(device), None, ranks=nproc)
    document = Document.load(file, overrides)
    for note in document.migrate():
        click.echo(f"{file}: note: {note}", err=True)

    from bridge.dist import verify as verification
    from bridge.dist.report import verification_tables, with_progress
    from bridge.dist.splits import cases

    config = document.config()
    training = _train_options(config, steps, text, seq_length, global_batch_size, micro_batch_size)
    found = verification.verify(document, training, world_size=nproc, start_method=start_method)
    at_work = [f"{split.name(nproc)} with {wrapping}" for split, wrapping in cases(nproc)]
    rows = list(
        with_progress(
            found,
            len(at_work),
            first="one process",
            describe=lambda done, _: at_work[done] if done < len(at_work) else "done",
        )
    )
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _print(verification_tables(rows))
    if any(row.is_mismatch for row in rows):
        raise click.exceptions.Exit(1)


class _Bytes(click.ParamType):  # type: ignore[type-arg]  # click 8.2 has no type for it
    """An amount of memory: a number and a unit, such as 80GiB."""

    name = "size"
    _UNITS: ClassVar = {"B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read the amount as bytes."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", str(value))
        if found is None or found[2] not in self._UNITS or float(found[1]) == 0:
            self.fail(f"{value!r} is no amount of memory: write 80GiB, or a number with {', '.join(self._UNITS)}")
        return int(float(found[1]) * self._UNITS[found[2]])


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option("--tp", type=_SIZE, help="Tensor-parallel size.")
@click.option("--pp", type=_SIZE, help="Pipeline-parallel size.")
@click.option("--vp", type=_SIZE, help="Virtual pipeline stages per rank.")
@click.option("--cp", type=_SIZE, help="Context-parallel size.")
@click.option("--ep", type=_SIZE, help="Expert-parallel size.")
@click.option("--etp", type=_SIZE, help="Expert-tensor-parallel size; by default that of --tp.")
@click.option("--dp", type=_SIZE, help="Data-parallel size; by default what --gpus leaves, or 1.")
@click.option("--gpus", type=_SIZE, help="Ranks in all; by default tp x pp x cp x dp.")
@click.option("--wrap", type=click.Choice(_WRAPPERS), default="ddp", show_default=True, help="Data-parallel wrapper.")
@click.option("--distributed-optimizer", is_flag=True, help="With ddp: shard the optimizer's state.")
@click.option("--micro-batch-size", type=_SIZE, default=1, show_default=True, help="Samples per forward pass.")
@click.option(
    "--global-batch-size",
    type=_SIZE,
    help="Samples per step, of all ranks; by default one microbatch a rank, in a pipeline two for each stage.",
)
@click.option("--seq-length", type=_SIZE, help="Tokens per sample; by default the model's.")
@click.option("--gpu-memory", type=_Bytes(), help="Memory of a GPU, such as 80GiB: exit code 1 if a rank holds more.")
@click.option("--search", is_flag=True, help="Rank the layouts of --gpus that fit; sizes that are given stay.")
@click.option("--gpu-tflops", type=_ABOVE_ZERO, default=989.0, show_default=True, help="For --search: of a GPU, dense.")
@click.option(
    "--efficiency",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="For --search: the share of them that is reached.",
)
@click.option("--gpus-per-node", type=_SIZE, default=8, show_default=True, help="For --search.")
@click.option("--node-bandwidth", type=_ABOVE_ZERO, default=450.0, show_default=True, help="For --search: GB/s a GPU.")
@click.option(
    "--network-bandwidth", type=_ABOVE_ZERO, default=50.0, show_default=True, help="For --search: GB/s a GPU."
)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with pictures there.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(
    file: str,
    overrides: tuple[str, ...],
    *,
    dp: int | None,
    gpus: int | None,
    wrap: str,
    distributed_optimizer: bool,
    micro_batch_size: int,
    global_batch_size: int | None,
    seq_length: int | None,
    gpu_memory: int | None,
    search: bool,
    gpu_tflops: float,
    efficiency: float,
    gpus_per_node: int,
    node_bandwidth: float,
    network_bandwidth: float,
    html: Path | None,
    as_json: bool,
    **sizes: int | None,
) -> None:
    """Plan a job of any size, without a GPU: what every rank of FILE's model holds, computes and sends.

    The real stages of each pipeline rank are built, wrapped and run where tensors have shapes and no memory, and
    everything is counted: weights, gradients, optimizer, activations at the peak of the schedule, FLOPs, messages.
    """
    start_run()
    hide_gpus()  # a plan takes none
    if search:
        if gpus is None:
            raise click.UsageError("--search needs --gpus, how many there are")
        if dp is not None or html is not None:
            raise click.UsageError("--search takes neither --dp, which follows from the other sizes, nor --html")
    document = Document.load(file, overrides)
    for note in document.migrate():
        click.echo(f"{file}: note: {note}", err=True)
    given = {name: value for name, value in sizes.items() if value is not None}
    if search:
        replace_layout(document, {}, sequence_parallel=False)
        start_fork_server(os.cpu_count() or 1, "bridge.dist.plan.search")
    else:
        apply_layout(document, given)
        refuse_before_imports(
            document,
            wrapper=Wrapper(wrap),
            world_size=gpus,
            dp=dp,
            distributed_optimizer=distributed_optimizer,
        )

    import_megatron(with_compiler=False)
    from bridge.dist.batch import Batch
    from bridge.dist.job import make_builder
    from bridge.dist.plan.advice import advise
    from bridge.dist.plan.plan import PlanOptions, job_layout, sequence_length
    from bridge.dist.plan.plan import plan as planned
    from bridge.dist.plan.search import Machine

    layout = job_layout(document, gpus=gpus, dp=dp)
    make_builder(document.config()).check_restore()
    microbatches = 2 * layout.pp if layout.pp > 1 else 1
    options = PlanOptions(
        batch=Batch(
            seq_length=seq_length or sequence_length(document),
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size or micro_batch_size * layout.dp * microbatches,
        ),
        world_size=layout.world_size,
        wrapper=Wrapper(wrap),
        distributed_optimizer=distributed_optimizer,
        gpu_memory=gpu_memory,
    )
    if search:
        machine = Machine(
            flops=gpu_tflops * 1e12,
            efficiency=efficiency,
            gpus_per_node=gpus_per_node,
            node_bandwidth=node_bandwidth * 1e9,
            network_bandwidth=network_bandwidth * 1e9,
        )
        _search(document, options, machine, given, as_json=as_json)
        return
    found = planned(document, options)
    if html is not None:
        from bridge.dist.plan.html import page

        html.write_text(page(found, title=Path(file).name.removesuffix(".yaml")), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        from bridge.dist.plan.text import tables

        _print(tables(found))
    if found.fits is False:
        for advice in advise(document, options, found):
            click.echo(f"with {advice.change} the worst rank holds {advice.total_bytes / 2**30:,.3f} GiB", err=True)
        raise click.exceptions.Exit(1)


def _search(
    document: Document, options: PlanOptions, machine: Machine, given: dict[str, int], *, as_json: bool
) -> None:
    from bridge.dist.plan.search import search
    from bridge.dist.plan.text import search_tables
    from bridge.dist.report import with_progress

    watch = partial(with_progress, first="planning", describe=lambda *_: "layouts planned")
    found = search(document, options, machine, fixed=given, watch=watch)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        _print(search_tables(found, machine))


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare(files: tuple[str, ...], *, as_json: bool) -> None:
    """Print build reports and plans side by side, and by how much each differs from the first.

    FILE is what `bridge build --json` or `bridge plan --json` printed. A build report alone is compared with the plan
    of the same job, which is made. Memory is that of the rank that holds most.
    """
    if len(files) == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a plan takes none

    from bridge.dist.run import compare as comparing  # rich, which other commands do without

    found = comparing.compare(files)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
    else:
        _print(comparing.tables(found))


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
