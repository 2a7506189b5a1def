"""Training steps with Megatron's own schedule and optimizer, comparable between layouts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.core.utils import get_model_config

from bridge.dist.checkpoint.progress import Progress
from bridge.dist.engine.forward import ForwardStep, next_token_step
from bridge.dist.engine.replicas import check_gradients
from bridge.dist.layout import Layout
from bridge.dist.train.batch import Batch
from bridge.dist.train.optimizer import set_up_optimizer
from bridge.dist.train.text import Text


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Batch):
    """The number of steps, the text, and the sizes of a batch."""

    steps: int
    text: Path
    tokenizer: Path | None = None
    """The tokenizer.json that turns the text into tokens; without one each byte is a token."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The result of one training step.

    ``number`` is 1 for the first step, and goes on from that of a loaded checkpoint. ``loss`` and ``grad_norm`` are the
    same on every rank; ``grad_norm`` is None if the step overflowed in fp16. ``seconds`` is the time on this rank until
    its device had finished.
    """

    number: int
    loss: float
    grad_norm: float | None
    seconds: float


def train(
    stages: list[MegatronModule],
    pg_collection: ProcessGroupCollection,
    layout: Layout,
    *,
    text: Text,
    options: TrainOptions,
    forward_step: ForwardStep = next_token_step,
    start: Callable[[Any], Progress] | None = None,
    finish: Callable[[Any, Progress], object] | None = None,
) -> Iterator[Step]:
    """Train lazily, one step per item. The loss is the mean over the tokens of the global batch, before the step.

    Collective: every rank of the layout must take every item.

    Args:
        stages: The wrapped stages of this rank.
        pg_collection: The process groups of this rank.
        layout: The sizes of the process groups.
        text: Source of the batches.
        options: Number of steps, and sizes of a batch.
        forward_step: ``forward_step`` of the builder that made the stages.
        start: Called with the optimizer before the first step; returns how far the run is, where data go on.
        finish: Called with the optimizer and how far the run is, after the last step.

    Raises:
        CopyError: Tensor-parallel ranks have different gradients of a parameter that is not split.
    """
    group_size = get_model_config(stages[0]).microbatch_group_size_per_vp_stage
    microbatches = options.count_microbatches(layout, group_size=group_size)
    with set_up_optimizer(stages) as optimizer:
        progress = start(optimizer) if start is not None else Progress()
        for index in range(options.steps):
            began = _synchronized_time()
            first = progress.samples + index * options.global_batch_size
            batch = text.make_batch(first, size=options.global_batch_size, seq_length=options.seq_length)
            mine = batch.view(layout.dp, microbatches, options.micro_batch_size, -1)[pg_collection.dp.rank()]
            zero_gradients(stages)
            optimizer.zero_grad()
            outputs = run_microbatches(stages, pg_collection, layout, mine, forward_step=forward_step)
            if index == 0:  # once: a missing attribute shows in the first gradients, and the check is slow
                check_gradients(stages, pg_collection)
            _, grad_norm, _ = optimizer.step()
            loss = _average_loss([output["loss"] for output in outputs], pg_collection)
            norm = None if grad_norm is None else float(grad_norm)
            number = progress.step + index + 1
            yield Step(number=number, loss=loss, grad_norm=norm, seconds=_synchronized_time() - began)
        if finish is not None:
            samples = progress.samples + options.steps * options.global_batch_size
            finish(optimizer, Progress(step=progress.step + options.steps, samples=samples))


def _synchronized_time() -> float:
    """Wait for the device and return the time in seconds."""
    torch.cuda.synchronize()
    return time.perf_counter()


def zero_gradients(stages: Sequence[MegatronModule]) -> None:
    """Zero the gradient buffers of stages that have any. Do this before each step."""
    for stage in stages:
        zero: Callable[[], None] | None = getattr(stage, "zero_grad_buffer", None)
        if zero is not None:
            zero()


def run_microbatches(
    stages: list[MegatronModule],
    pg_collection: ProcessGroupCollection,
    layout: Layout,
    samples: torch.Tensor,
    *,
    forward_step: ForwardStep,
) -> list[dict[str, torch.Tensor]]:
    """Run the forward and backward passes of a step with Megatron's schedule, and reduce the gradients.

    Collective. Call it within ``set_up_optimizer``.

    Args:
        stages: The wrapped stages of this rank.
        pg_collection: The process groups of this rank.
        layout: Its pipeline sizes select the schedule.
        samples: The tokens of this rank, shape [microbatches, micro batch size, sequence + 1].
        forward_step: ``forward_step`` of the builder that made the stages.

    Returns:
        On the last stage the loss of each microbatch; on other stages an empty list.
    """
    schedule = get_forward_backward_func(pp_size=layout.pp, vp_size=layout.vp if layout.vp > 1 else None)
    outputs: list[dict[str, torch.Tensor]] = schedule(
        forward_step_func=partial(_forward, forward_step=forward_step, pg_collection=pg_collection),
        data_iterator=[iter(samples) for _ in stages] if len(stages) > 1 else iter(samples),
        model=stages,
        num_microbatches=samples.shape[0],
        seq_length=samples.shape[2] - 1,
        micro_batch_size=samples.shape[1],
        forward_only=False,
    )
    return outputs


def _forward(
    samples: Iterator[torch.Tensor],
    stage: MegatronModule,
    *,
    forward_step: ForwardStep,
    pg_collection: ProcessGroupCollection,
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]]:
    """Run a stage on the next microbatch. On the last stage, Megatron's schedule calls the returned loss function."""
    output = forward_step(stage, next(samples).to(torch.device("cuda")), pg_collection)

    def compute_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.float().mean()
        # The schedule of megatron-core 0.19.2 multiplies by the context-parallel size, in place: undo the factor, and
        # report a copy.
        return loss / pg_collection.cp.size(), {"loss": loss.detach().clone()}

    return output, compute_loss


def _average_loss(losses: Sequence[torch.Tensor], pg_collection: ProcessGroupCollection) -> float:
    """Average the losses over the data-parallel ranks, and broadcast the result from the last pipeline stage."""
    device = torch.device("cuda")
    loss = torch.stack(list(losses)).mean() if losses else torch.zeros((), device=device)
    if losses:
        torch.distributed.all_reduce(loss, group=pg_collection.dp_cp)
        loss /= pg_collection.dp_cp.size()
    torch.distributed.broadcast(loss, group_src=pg_collection.pp.size() - 1, group=pg_collection.pp)
    return loss.item()
