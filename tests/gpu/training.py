"""Training jobs of one rank, on the GPU with NCCL, or without a GPU on the CPU with gloo."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu.settings import BATCH, PRECISIONS, STEPS
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

from bridge.config import Document, ModelConfig
from bridge.dist import Layout, destroy_process_groups
from bridge.dist.job import BuildJob
from bridge.dist.run.devices import forbid_tf32
from bridge.dist.run.execute import BuiltRank, build_and_train
from bridge.dist.run.rank import join_job
from bridge.dist.train.step import TrainOptions, train
from bridge.dist.train.text import Text
from bridge.dist.wrapper import Wrapper

TEXT = Path(__file__).parents[2] / "LICENSE"
"""The training text. The default, torch's licence, changes with the version of torch."""


Curves = dict[str, list[float | None]]
"""``losses`` and ``grad_norms`` of the training steps."""


class JoinedRank(NamedTuple):
    """The configuration, layout and process groups of the only rank."""

    config: ModelConfig
    layout: Layout
    groups: ProcessGroupCollection


def make_job(
    model: str,
    overrides: Sequence[str] = (),
    *,
    wrapper: str = "ddp",
    distributed_optimizer: bool = False,
    training: TrainOptions | None = None,
) -> BuildJob:
    """Return the build job of a preset."""
    return BuildJob(
        document=Document.load(model, overrides).data,
        wrapper=Wrapper(wrapper),
        distributed_optimizer=distributed_optimizer,
        training=training,
    )


def make_train_options(steps: int = STEPS) -> TrainOptions:
    """Return the training options of the small models: several microbatches per step."""
    return TrainOptions(steps=steps, text=TEXT, **BATCH)


@contextlib.contextmanager
def join_single_rank(job: BuildJob) -> Iterator[JoinedRank]:
    """Join a world of one rank for a job, and always leave it, so that the next row can join another."""
    forbid_tf32()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        with join_job(job) as (config, layout, groups):
            world = torch.distributed.group.WORLD
            assert world is not None
            assert world.bound_device_id is None, "NCCL connects all groups at once, before their first use"
            yield JoinedRank(config, layout, groups)
    finally:
        if torch.distributed.is_initialized():
            destroy_process_groups()
            torch.distributed.destroy_process_group()


def train_model(
    model: str,
    precision: str,
    overrides: Sequence[str] = (),
    wrapper: str = "ddp",
    distributed_optimizer: bool = False,
) -> Curves:
    """Train a model five steps from weights initialised by parameter name; return losses and gradient norms."""
    job = make_job(
        model,
        [*PRECISIONS[precision], *overrides],
        wrapper=wrapper,
        distributed_optimizer=distributed_optimizer,
        training=make_train_options(),
    )
    with join_single_rank(job) as rank:
        return get_curves(build_and_train(job, *rank))


def get_curves(run: BuiltRank) -> Curves:
    """Return the losses and gradient norms of the training steps."""
    return {"losses": [step.loss for step in run.steps], "grad_norms": [step.grad_norm for step in run.steps]}


def train_as_initialised(model: str, overrides: Sequence[str], wrapper: str) -> dict[str, Any]:
    """Train a model with megatron-core's initial weights; return the devices of its parameters, and the losses.

    ``built_on`` names the devices before parameters are moved, ``trained_on`` those after training.
    """
    job = make_job(model, overrides, wrapper=wrapper)
    built_on: set[str] = set()

    def record_devices(stages: list[MegatronModule]) -> list[MegatronModule]:
        built_on.update(parameter.device.type for stage in stages for parameter in stage.parameters())
        return stages

    with join_single_rank(job) as rank:
        rank.config.pre_wrap_hooks.append(record_devices)
        run = build_and_train(job, *rank)
        losses = train_stages(run.stages, rank, job, make_train_options())
        trained_on = {parameter.device.type for stage in run.stages for parameter in stage.parameters()}
    return {"built_on": sorted(built_on), "trained_on": sorted(trained_on), "losses": losses}


def train_stages(stages: list[MegatronModule], rank: JoinedRank, job: BuildJob, options: TrainOptions) -> list[float]:
    """Train built stages; return the losses."""
    builder = job.make_builder(rank.config)
    text = Text.read(options.text, vocab_size=rank.config.vocab_size)  # type: ignore[attr-defined]
    steps = train(stages, rank.groups, rank.layout, text=text, options=options, forward_step=builder.forward_step)
    return [step.loss for step in steps]
