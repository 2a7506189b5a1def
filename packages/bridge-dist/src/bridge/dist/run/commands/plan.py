"""The command `bridge plan`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

from bridge.config import Document
from bridge.dist.checks.document import refuse_before_imports
from bridge.dist.document_layout import apply_layout, replace_layout
from bridge.dist.plan.forecast.machine import Machine
from bridge.dist.plan.request import PlanRequest
from bridge.dist.process.imports import import_megatron
from bridge.dist.process.messages import start_run
from bridge.dist.run.commands.options import SIZE, WRAPPERS, CommandT
from bridge.dist.run.commands.output import print_notes, print_parts
from bridge.dist.run.devices import hide_gpus
from bridge.dist.run.pool import start_fork_server
from bridge.dist.wrapper import Wrapper

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

OptionsT = TypeVar("OptionsT", bound="DataclassInstance")

_ABOVE_ZERO = click.FloatRange(0, min_open=True)


class _Bytes(click.ParamType):  # type: ignore[type-arg]  # click 8.2 has no type for it
    """A memory size: a number and a unit, such as 80GiB."""

    name = "size"
    _UNITS: ClassVar = {"B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert the text to bytes."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", str(value))
        if found is None or found[2] not in self._UNITS or float(found[1]) == 0:
            self.fail(f"{value!r} is not a memory size: write one such as 80GiB; units are {', '.join(self._UNITS)}")
        return int(float(found[1]) * self._UNITS[found[2]])


def _add_plan_options(command: CommandT) -> CommandT:
    """Add an option for each field of ``PlanRequest`` to a command."""
    for option in reversed(
        (
            click.option("--tp", type=SIZE, help="Tensor-parallel size."),
            click.option("--pp", type=SIZE, help="Pipeline-parallel size."),
            click.option("--vp", type=SIZE, help="Virtual pipeline stages per rank."),
            click.option("--cp", type=SIZE, help="Context-parallel size."),
            click.option("--ep", type=SIZE, help="Expert-parallel size."),
            click.option("--etp", type=SIZE, help="Expert-tensor-parallel size; by default the value of --tp."),
            click.option("--dp", type=SIZE, help="Data-parallel size; by default as --gpus implies, else 1."),
            click.option("--gpus", type=SIZE, help="Total number of ranks; by default tp x pp x cp x dp."),
            click.option(
                "--wrap",
                "wrapper",
                type=click.Choice(WRAPPERS),
                default="ddp",
                show_default=True,
                callback=lambda ctx, param, value: Wrapper(value),
                help="Data-parallel wrapper.",
            ),
            click.option("--distributed-optimizer", is_flag=True, help="With ddp: shard the optimizer state."),
            click.option(
                "--micro-batch-size", type=SIZE, default=1, show_default=True, help="Samples per forward pass."
            ),
            click.option(
                "--global-batch-size",
                type=SIZE,
                help="Samples per step over all ranks; by default one microbatch per rank, with a pipeline two per "
                "stage.",
            ),
            click.option("--seq-length", type=SIZE, help="Tokens per sample; by default the model's seq_length."),
            click.option(
                "--gpu-memory", type=_Bytes(), help="Memory of a GPU, such as 80GiB; exit code 1 if a rank needs more."
            ),
        )
    ):
        command = option(command)
    return command


def _add_machine_options(command: CommandT) -> CommandT:
    """Add an option for each field of ``Machine``. Options are in TFLOPs and GB/s, fields in FLOPs and B/s."""

    def make_speed_option(
        flag: str, field: str, *, unit: float, default: float, meaning: str
    ) -> Callable[[CommandT], CommandT]:
        return click.option(
            flag,
            field,
            type=_ABOVE_ZERO,
            default=default,
            show_default=True,
            callback=lambda ctx, param, value: value * unit,
            help=f"For --search: {meaning}",
        )

    for option in reversed(
        (
            make_speed_option(
                "--gpu-tflops", "flops", unit=1e12, default=989.0, meaning="dense TFLOPs per second of a GPU."
            ),
            click.option(
                "--efficiency",
                type=click.FloatRange(0, 1, min_open=True),
                default=0.5,
                show_default=True,
                help="For --search: achieved share of the peak TFLOPs.",
            ),
            click.option(
                "--gpus-per-node", type=SIZE, default=8, show_default=True, help="For --search: GPUs per node."
            ),
            make_speed_option(
                "--node-bandwidth", "node_bandwidth", unit=1e9, default=450.0, meaning="GB/s per GPU in a node."
            ),
            make_speed_option(
                "--network-bandwidth",
                "network_bandwidth",
                unit=1e9,
                default=50.0,
                meaning="GB/s per GPU between nodes.",
            ),
        )
    ):
        command = option(command)
    return command


def _make_from_options(kind: type[OptionsT], options: Mapping[str, Any]) -> OptionsT:
    """Return a dataclass filled from the options of the same names."""
    return kind(**{field.name: options[field.name] for field in fields(kind)})


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@_add_plan_options
@click.option("--search", is_flag=True, help="Rank all layouts of --gpus that fit; sizes given as options are kept.")
@_add_machine_options
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="Write an HTML page with diagrams to this file."
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(
    file: str,
    overrides: tuple[str, ...],
    *,
    search: bool,
    html: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Plan a job of any size without GPUs: memory, FLOPs and communication of every rank of FILE's model.

    The real stages of each pipeline rank are built, wrapped and run on the meta device, where tensors have no memory.
    Counted are weights, gradients, optimizer state, activations at the peak of the schedule, FLOPs and messages.
    """
    start_run()
    hide_gpus()  # planning uses no GPU
    request = _make_from_options(PlanRequest, options)
    if search:
        if request.gpus is None:
            raise click.UsageError("--search needs --gpus: add the number of GPUs")
        if request.dp is not None or html is not None:
            raise click.UsageError("--search does not accept --dp, which follows from the other sizes, or --html")
    document = Document.load(file, overrides)
    print_notes(file, document.migrate())
    if search:
        _search_layouts(document, request, _make_from_options(Machine, options), as_json=as_json)
    else:
        _plan_layout(document, request, html, as_json=as_json)


def _plan_layout(document: Document, request: PlanRequest, html: Path | None, *, as_json: bool) -> None:
    """Plan the layout of a document, changed by the requested sizes, and print the plan."""
    apply_layout(document, request.sizes)
    refuse_before_imports(
        document,
        wrapper=request.wrapper,
        world_size=request.gpus,
        dp=request.dp,
        distributed_optimizer=request.distributed_optimizer,
    )
    import_megatron(with_compiler=False)
    from bridge.dist.plan.forecast.advice import advise
    from bridge.dist.plan.plan import make_plan_options, plan

    options = make_plan_options(document, request)
    found = plan(document, options)
    if html is not None:
        from bridge.dist.plan.show.page import render_page

        title = Path(document.source).name.removesuffix(".yaml")
        html.write_text(render_page(found, title=title), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        from bridge.dist.plan.show.terminal import render_plan

        print_parts(render_plan(found))
    if found.fits is False:
        for advice in advise(document, options, found):
            click.echo(f"with {advice.change} the largest rank needs {advice.total_bytes / 2**30:,.3f} GiB", err=True)
        raise click.exceptions.Exit(1)


def _search_layouts(document: Document, request: PlanRequest, machine: Machine, *, as_json: bool) -> None:
    """Search the layouts of the requested GPUs and print the fastest."""
    replace_layout(document, {}, sequence_parallel=False)
    start_fork_server(os.cpu_count() or 1, "bridge.dist.plan.forecast.search")
    import_megatron(with_compiler=False)
    from bridge.dist.plan.forecast.search import search
    from bridge.dist.plan.plan import make_plan_options
    from bridge.dist.plan.show.terminal import render_search
    from bridge.dist.run.progress import show_progress

    options = make_plan_options(document, request)
    watch = partial(show_progress, first="planning", describe=lambda *_: "layouts planned")
    found = search(document, options, machine, fixed=request.sizes, watch=watch)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        print_parts(render_search(found, machine))
