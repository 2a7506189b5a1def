"""The command `bridge build`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bridge.config import BridgeError
from bridge.config.documents.sources import STANDARD_INPUT
from bridge.config.tracebacks import format_error
from bridge.dist.checkpoint.folder import check_save_folder
from bridge.dist.checks.document import refuse_before_imports
from bridge.dist.document_layout import apply_layout
from bridge.dist.errors import CheckpointError
from bridge.dist.fusions import choose_fusions
from bridge.dist.process.parent import die_with_launcher
from bridge.dist.run.commands.inputs import read_inputs
from bridge.dist.run.commands.options import (
    LOCAL_RANKS,
    SIZE,
    add_layout_options,
    add_origin_options,
    add_training_options,
    check_batch,
    check_sharding_strategy,
    device_option,
    make_train_options,
)
from bridge.dist.run.commands.output import print_parts
from bridge.dist.run.devices import Device
from bridge.dist.run.origin import choose_origin
from bridge.dist.run.pool import launch
from bridge.dist.run.rank_environment import RankEnvironment
from bridge.dist.run.start import prepare
from bridge.dist.wrapper import ShardingStrategy, Wrapper, resolve_sharding_strategy

if TYPE_CHECKING:
    from bridge.dist.run.report import BuildReport


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option("--nproc", type=LOCAL_RANKS, help="Ranks to start here; by default those of torchrun or srun, else 1.")
@add_layout_options
@click.option("--dp", type=SIZE, help="Expected data-parallel size; an error if the other sizes give another.")
@click.option("--steps", type=SIZE, help="Train this many steps.")
@add_origin_options
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    help="Save the model, and with --steps optimizer and random states, as a Megatron checkpoint in this folder.",
)
@click.option(
    "--force", is_flag=True, help="Let --save use a folder that exists, and replace an iteration of the same number."
)
@device_option
@add_training_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def build(
    file: str,
    overrides: tuple[str, ...],
    *,
    nproc: int | None,
    wrapper: Wrapper,
    distributed_optimizer: bool,
    sharding_strategy: ShardingStrategy | None,
    steps: int | None,
    load: Path | None,
    save: Path | None,
    force: bool,
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
    check_sharding_strategy(wrapper, sharding_strategy)
    rank_environment = RankEnvironment.read(os.environ) if nproc is None else None
    if file == STANDARD_INPUT and rank_environment is not None:
        raise click.UsageError("ranks started by torchrun or srun cannot share standard input: pass a file name")
    is_leader = rank_environment is None or rank_environment.rank == 0
    with _report_errors(rank_environment):
        inputs = read_inputs(file, overrides, load, random_init=random_init, is_quiet=not is_leader)
        document = inputs.document
        apply_layout(document, {name: value for name, value in sizes.items() if value is not None})
        ranks = (nproc or 1) if rank_environment is None else rank_environment.world_size
        setup = refuse_before_imports(
            document,
            wrapper=wrapper,
            world_size=ranks,
            dp=dp,
            distributed_optimizer=distributed_optimizer,
            sharding_strategy=sharding_strategy,
        )
        if setup is not None and steps is not None:
            check_batch(
                setup, seq_length=seq_length, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size
            )
        origin = choose_origin(document, inputs.load, random_init=random_init)
        if save is not None or origin.checkpoint is not None:
            _check_can_be_saved(wrapper, sharding_strategy)
        if save is not None and not force:
            check_save_folder(save, origin.checkpoint)
        inputs.check_weights(origin)
        start_method = prepare(Device(device), rank_environment, ranks=nproc or 1)
        from megatron.core.extensions.transformer_engine import HAVE_TE

        from bridge.dist.job import BuildJob
        from bridge.dist.run.rank import run_rank

        fusions = choose_fusions(document) if HAVE_TE else []
        config = document.config()
        training = None
        if steps is not None:
            training = make_train_options(
                config, steps, text, seq_length, global_batch_size, micro_batch_size, origin=origin
            )
            if origin.weights is not None and training.tokenizer is None:
                inputs.print_notes(["has no tokenizer.json: each byte of the text is a token"])
        job = BuildJob(
            document=document.data,
            overrides=overrides,
            fusions=tuple(fusions),
            wrapper=wrapper,
            distributed_optimizer=distributed_optimizer,
            sharding_strategy=sharding_strategy,
            dp=dp,
            training=training,
            **vars(origin),
            save=save,
            replace_saved=force,
        )
        job.check(config, ranks)
        job.make_builder(config).check_restore()
        report = run_rank(job) if rank_environment else launch(run_rank, job, ranks=ranks, start_method=start_method)
    if is_leader:
        _print_report(report, as_json=as_json)


def _check_can_be_saved(wrapper: Wrapper, strategy: ShardingStrategy | None) -> None:
    """Check early, as ``bridge.dist.checkpoint`` does late, that what a wrapper shards can be saved and loaded.

    Raises:
        CheckpointError: It cannot.
    """
    strategy = resolve_sharding_strategy(wrapper, strategy)
    if strategy not in (None, ShardingStrategy.OPTIM_GRADS_PARAMS):
        raise CheckpointError(
            f"Megatron-FSDP with --sharding-strategy {strategy} can neither save nor load checkpoints: use "
            f"{ShardingStrategy.OPTIM_GRADS_PARAMS}, or --wrap ddp"
        )


@contextlib.contextmanager
def _report_errors(rank_environment: RankEnvironment | None) -> Iterator[None]:
    """Print an error only once if every rank of a launcher finds it, and record it for torchrun."""
    if rank_environment is None:
        yield
        return
    die_with_launcher()
    from bridge.dist.run import failure_detection  # imports torch, which `bridge -h` must not wait for

    try:
        with failure_detection.exit_on_signals(rank_environment), failure_detection.watch_nodes(rank_environment):
            yield
    except Exception as error:
        failure_detection.record_for_launcher(error)
        if failure_detection.is_first_to_print(
            str(error) if isinstance(error, BridgeError) else format_error(error), rank_environment
        ):
            raise
        raise click.exceptions.Exit(1) from None


def _print_report(report: BuildReport, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
        return
    from bridge.dist.run.tables import render_report

    print_parts(render_report(report))
