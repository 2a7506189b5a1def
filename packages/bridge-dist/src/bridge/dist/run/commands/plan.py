"""The command `bridge plan`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge.config import Document
from bridge.config.cli.output import print_notes, write_output
from bridge.dist.checks.document import refuse_before_imports
from bridge.dist.document_layout import apply_layout
from bridge.dist.formatting import format_gib, format_seconds
from bridge.dist.plan.forecast.machine import Machine
from bridge.dist.plan.layers import choose_layers, prepare_process
from bridge.dist.plan.request import PlanRequest
from bridge.dist.plan.results import Origin, Plan
from bridge.dist.process.imports import import_megatron
from bridge.dist.process.messages import start_run
from bridge.dist.run.commands.options import (
    SIZE,
    CommandKeepingArguments,
    add_html_option,
    check_sharding_strategy,
    format_command,
)
from bridge.dist.run.commands.output import print_parts
from bridge.dist.run.commands.plan_options import (
    PRICE,
    TOKENS,
    add_machine_option,
    add_plan_options,
    check_precision,
    make_from_options,
)
from bridge.dist.run.devices import hide_gpus

if TYPE_CHECKING:
    from bridge.dist.plan.forecast.advice import Advice


@click.command(cls=CommandKeepingArguments)
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option("--gpus", type=SIZE, help="Total number of ranks; by default tp x pp x cp x dp.")
@click.option("--dp", type=SIZE, help="Data-parallel size; by default as --gpus implies, else 1.")
@add_plan_options
@add_machine_option
@click.option("--tokens", type=TOKENS, help="Tokens to train on, such as 15T: prints days and GPU-hours.")
@click.option("--price", type=PRICE, help="With --tokens: price of a GPU-hour; prints the cost.")
@add_html_option
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(
    file: str,
    overrides: tuple[str, ...],
    *,
    machine: Machine,
    tokens: int | None,
    price: float | None,
    html: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Plan a job of any size without GPUs: memory, FLOPs and communication of every rank of FILE's model.

    The real stages of each pipeline rank are built, wrapped and run on the meta device, where tensors have no memory.
    Counted are weights, gradients, optimizer state, activations at the peak of the schedule, FLOPs and messages.
    The time of a step on a machine is estimated from them.
    """
    if price is not None and tokens is None:
        raise click.UsageError("--price needs --tokens: add the number of tokens to train on")
    request = make_from_options(PlanRequest, options | {"gpu_memory": options["gpu_memory"] or machine.memory})
    check_sharding_strategy(request.wrapper, request.sharding_strategy)
    start_run()
    hide_gpus()  # planning uses no GPU
    document = Document.load(file, overrides)
    print_notes(file, document.migrate())
    check_precision(document, machine)
    _plan_layout(document, request, machine, overrides, tokens=tokens, price=price, html=html, as_json=as_json)


def _plan_layout(
    document: Document,
    request: PlanRequest,
    machine: Machine,
    overrides: Sequence[str],
    *,
    tokens: int | None,
    price: float | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Plan the layout of a document, changed by the requested sizes, and print the plan and its time on a machine."""
    apply_layout(document, request.sizes)
    setup = refuse_before_imports(
        document,
        wrapper=request.wrapper,
        world_size=request.gpus,
        dp=request.dp,
        distributed_optimizer=request.distributed_optimizer,
        sharding_strategy=request.sharding_strategy,
    )
    if setup is not None and (length := request.seq_length or getattr(setup.model, "seq_length", None)):
        request.make_batch(setup.layout, seq_length=length).check(setup.transformer, setup.layout)
    prepare_process(choose_layers(document, request.layers))
    import_megatron(with_compiler=False)
    from bridge.dist.checks.agreement import collect_versions
    from bridge.dist.plan.forecast.advice import advise
    from bridge.dist.plan.forecast.step_time import compute_training_cost, estimate_time
    from bridge.dist.plan.plan import make_plan_options, plan

    options = replace(make_plan_options(document, request), transposes_fp8=machine.transposes_fp8)
    found = plan(document, options)
    time = estimate_time(found, machine)
    if tokens is not None:
        time = replace(time, training=compute_training_cost(found, time, tokens=tokens, price=price))
    found = replace(found, time=time)
    origin = Origin(command=format_command(), overrides=list(overrides), versions=collect_versions())
    _print_plan(found, origin, as_json=as_json)
    helpful = advise(document, options, found, machine) if found.fits is False else []
    _print_advice(helpful, found)
    if html is not None:
        from bridge.dist.plan.show.page import render_page

        title = Path(document.source).name.removesuffix(".yaml")
        page = render_page(found, title, machine=machine, origin=origin, advice=helpful)
        write_output(page, html)
    if found.fits is False:
        raise click.exceptions.Exit(1)


def _print_plan(found: Plan, origin: Origin, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found.to_json() | asdict(origin), indent=2))
        return
    from bridge.dist.plan.show.terminal import render_plan

    print_parts(render_plan(found))


def _print_advice(helpful: Sequence[Advice], found: Plan) -> None:
    """Print which changes would let a job fit that does not."""
    for advice in helpful:
        needed = format_gib(advice.total_bytes + found.reserve_bytes)
        step = format_seconds(advice.step_seconds)
        click.echo(
            f"with {advice.change} the largest rank needs {needed} GiB with its reserve, and a step takes {step}",
            err=True,
        )
