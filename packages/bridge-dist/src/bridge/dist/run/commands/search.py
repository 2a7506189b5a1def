"""The command `bridge search`."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge.config import ConfigError, Document
from bridge.config.cli.output import check_output, print_notes, print_written
from bridge.config.documents.sources import SUFFIXES
from bridge.dist.checks.document import refuse_before_imports
from bridge.dist.document_layout import LAYOUT_FIELDS, find_transformer, replace_layout
from bridge.dist.layout import CONFIG_FIELDS
from bridge.dist.plan.forecast.machine import Machine
from bridge.dist.plan.layers import choose_layers, list_first_imports, prepare_process
from bridge.dist.plan.request import PlanRequest
from bridge.dist.process.imports import import_megatron
from bridge.dist.process.messages import start_run
from bridge.dist.run.commands.options import SIZE, check_sharding_strategy
from bridge.dist.run.commands.output import print_parts
from bridge.dist.run.commands.plan_options import (
    MACHINE,
    add_machine_option,
    add_search_options,
    check_precision,
    make_from_options,
)
from bridge.dist.run.devices import hide_gpus
from bridge.dist.run.pool import start_fork_server
from bridge.dist.wrapper import Wrapper

if TYPE_CHECKING:
    from bridge.dist.plan.forecast.ranking import Candidate
    from bridge.dist.plan.forecast.search import Progress
    from bridge.dist.plan.forecast.space import Fixed


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option("--gpus", type=SIZE, required=True, help="Total number of ranks.")
@add_search_options
@add_machine_option
@click.option("--top", type=SIZE, default=5, show_default=True, help="Number of layouts to find.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the model with the fastest layout to this document.",
)
@click.option("--force", is_flag=True, help="Overwrite the document.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def search(
    file: str,
    overrides: tuple[str, ...],
    *,
    machine: Machine,
    top: int,
    output: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Search for the fastest way to train FILE's model on a number of GPUs.

    The search decides on the sizes of parallelism, the micro-batch size, the wrapper and what is recomputed; with --fp8
    also on the precision. What options or overrides set is kept. The layout and the recomputation of FILE itself are
    ignored. Choices are ranked by the step time that `bridge plan` estimates, and must fit the memory of a GPU.
    """
    check_sharding_strategy(options["wrapper"], options["sharding_strategy"])
    start_run()
    hide_gpus()  # planning uses no GPU
    if output is not None:
        _check_output(output, force=force)
    if options["fp8_recipe"] is not None and machine.fp8_flops is None:
        raise click.UsageError(f"--fp8: GPUs of {machine.name} have no FP8")
    request = make_from_options(PlanRequest, options | {"gpu_memory": options["gpu_memory"] or machine.memory})
    document = Document.load(file, overrides)
    print_notes(file, document.migrate())
    check_precision(document, machine)
    _refuse_early(document, request, options)
    layers = choose_layers(document, request.layers)
    prepare_process(layers)
    start_fork_server(os.cpu_count() or 1, "bridge.dist.plan.forecast.search", first=list_first_imports(layers))
    import_megatron(with_compiler=False)
    from bridge.dist.plan.forecast.search import search
    from bridge.dist.plan.plan import make_plan_options
    from bridge.dist.plan.show.terminal import render_search
    from bridge.dist.run.progress import show_progress

    fixed = _find_fixed(document, overrides, options)
    replace_layout(document, {}, sequence_parallel=False)
    watch = partial(show_progress, total=None, first="searching", describe=_describe, count=_count)
    planned = replace(make_plan_options(document, request), transposes_fp8=machine.transposes_fp8)
    found = search(document, planned, machine, fixed=fixed, top=top, watch=watch)
    commands = []
    if output is not None:
        best = found.candidates[0]
        best.choice.apply(document, fixed).save(output)
        print_written(output)
        commands = _list_commands(output, best, click.get_current_context().meta[MACHINE], options)
    if as_json:
        click.echo(json.dumps(found.to_json() | {"commands": commands}, indent=2))
        return
    print_parts(render_search(found, machine))
    for command in commands:
        click.echo(command)


def _refuse_early(document: Document, request: PlanRequest, options: dict[str, Any]) -> None:
    """Refuse early what no layout with the sizes and the wrapper to keep could train."""
    changed = deepcopy(document)
    # Whether virtual stages are possible depends on the number of pipeline ranks.
    sizes = {axis: size for axis, size in request.sizes.items() if axis != "vp" or request.pp}
    replace_layout(changed, sizes, sequence_parallel=sizes.get("tp", 1) > 1)
    wrapper = options["wrapper"] or Wrapper.NONE  # without one, the rules about wrappers find nothing
    setup = refuse_before_imports(
        changed,
        wrapper=wrapper,
        world_size=request.gpus,
        distributed_optimizer=wrapper is Wrapper.DDP and options["distributed_optimizer"] is not False,
        sharding_strategy=request.sharding_strategy,
    )
    if setup is not None and (length := request.seq_length or getattr(setup.model, "seq_length", None)):
        request.make_batch(setup.layout, seq_length=length).check_sequence(setup.transformer)


def _check_output(output: Path, *, force: bool) -> None:
    """Check before the search that its result can be written."""
    if output.suffix not in SUFFIXES:
        raise ConfigError(f"{output}: expected a .yaml, .yml or .json file")
    check_output(output, force=force)


def _find_fixed(document: Document, overrides: Sequence[str], options: dict[str, Any]) -> Fixed:
    """Return what options and overrides set, which the search keeps."""
    from bridge.dist.plan.forecast.space import RECOMPUTE_FIELDS, Fixed, Recompute  # imports torch

    prefix, fields = find_transformer(document)
    paths = {text.removeprefix("+").partition("=")[0] for text in overrides}
    kept = {
        name: fields[name]
        for name in (*LAYOUT_FIELDS, *RECOMPUTE_FIELDS, "fp8", "fp8_recipe")
        if prefix + name in paths and name in fields
    }
    sizes = {axis: kept.pop(name) for axis, name in CONFIG_FIELDS.items() if name in kept}
    given = {axis: options[axis] for axis in CONFIG_FIELDS if options[axis] is not None}
    recomputation = {name: kept.pop(name) for name in RECOMPUTE_FIELDS if name in kept}
    recipe = options["fp8_recipe"]
    return Fixed(
        sizes=sizes | given,
        micro_batch_size=options["micro_batch_size"],
        wrapper=options["wrapper"],
        distributed_optimizer=options["distributed_optimizer"],
        sharding_strategy=options["sharding_strategy"],
        recompute=Recompute.of(recomputation) if recomputation else None,
        fp8_recipes=(None,) if recipe is None else (None, recipe),
        fields=kept,
    )


def _describe(_: int, state: Progress) -> str:
    done = f"{state.planned} planned, {state.ruled_out} ruled out, {state.left} left"
    return done if state.best is None else f"{done}; best {state.best.seconds:.3f} s: {state.best.choice}"


def _count(state: Progress) -> tuple[int, int]:
    done = state.planned + state.ruled_out
    return done, done + state.left


def _list_commands(file: Path, best: Candidate, machine: str, options: dict[str, Any]) -> list[str]:
    """Return the commands that plan and build a document under the best choice, on as many ranks."""
    plan, choice = best.plan, best.choice
    flags = ["--wrap", str(choice.wrapper)]
    if choice.distributed_optimizer:
        flags.append("--distributed-optimizer")
    if choice.sharding_strategy is not None:
        flags += ["--sharding-strategy", str(choice.sharding_strategy)]
    sizes = {
        "--micro-batch-size": plan.micro_batch_size,
        "--global-batch-size": plan.global_batch_size,
        "--seq-length": plan.seq_length,
    }
    flags += [str(word) for pair in sizes.items() for word in pair]
    planned = ["bridge", "plan", str(file), "--gpus", str(plan.world_size), "--machine", machine, *flags]
    for name in ("gpu_memory", "reserve"):
        if options[name] is not None:
            planned += [f"--{name.replace('_', '-')}", f"{options[name]}B"]
    if options["layers"] is not None:
        planned += ["--layers", options["layers"]]
    return [shlex.join(planned), shlex.join(["bridge", "build", str(file), *flags, "--steps", "10"])]
