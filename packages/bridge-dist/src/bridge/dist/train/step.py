"""A few training steps by Megatron's own schedule and optimizer, comparable between layouts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.core.utils import get_model_config

from bridge.dist.engine.forward import ForwardStep, next_token_step
from bridge.dist.engine.replicas import check_gradients
from bridge.dist.layout import Layout
from bridge.dist.train.batch import Batch
from bridge.dist.train.optimizer import set_up_optimizer
from bridge.dist.train.text import Text


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Batch):
    """How many steps, on which text, and the sizes of a batch."""

    steps: int
    text: Path


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one training step gave, the same on every rank; no gradient norm for a step that overflowed in fp16.

    ``seconds`` are this rank's, until its device was done.
    """

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
) -> Iterator[Step]:
    """Train, one step per item taken. The loss is the mean over the tokens of the global batch, before the step.

    Every rank of the layout must take every step. ``forward_step`` is that of the builder that made the stages.

    Raises:
        CopyError: Tensor-parallel ranks have different gradients of a parameter that is not split.
    """
    group_size = get_model_config(stages[0]).microbatch_group_size_per_vp_stage
    microbatches = options.microbatches(layout, group_size=group_size)
    with set_up_optimizer(stages) as optimizer:
        for index in range(options.steps):
            start = _time_when_done()
            batch = text.batch(index, size=options.global_batch_size, seq_length=options.seq_length)
            mine = batch.view(layout.dp, microbatches, options.micro_batch_size, -1)[pg_collection.dp.rank()]
            zero_gradients(stages)
            optimizer.zero_grad()
            outputs = run_microbatches(stages, pg_collection, layout, mine, forward_step=forward_step)
            if index == 0:
                check_gradients(stages, pg_collection)
            _, grad_norm, _ = optimizer.step()
            loss = _global_loss([output["loss"] for output in outputs], pg_collection)
            norm = None if grad_norm is None else float(grad_norm)
            yield Step(loss=loss, grad_norm=norm, seconds=_time_when_done() - start)


def _time_when_done() -> float:
    """Read the clock when the device has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def zero_gradients(stages: Sequence[MegatronModule]) -> None:
    """Set the buffers of gradients that stages have to zero, as before each step."""
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
    """Run forward and backward passes by Megatron's schedule, and reduce the gradients.

    Every rank of the layout must do so, within ``set_up_optimizer``.

    Args:
        stages: Those of this rank.
        pg_collection: The process groups of this rank.
        layout: Its pipeline decides on the schedule.
        samples: This rank's tokens, shape [microbatches, samples of each, sequence + 1].
        forward_step: That of the builder that made the stages.

    Returns:
        On the last stage the loss of each microbatch.
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
    """Run a stage on the next microbatch; Megatron's schedule calls the returned function on the last stage."""
    output = forward_step(stage, next(samples).to(torch.device("cuda")), pg_collection)

    def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.float().mean()
        # The schedule multiplies by the context-parallel size, and works in place (megatron-core 0.19.2): undo the
        # one, and report a copy because of the other.
        return loss / pg_collection.cp.size(), {"loss": loss.detach().clone()}

    return output, mean_loss


def _global_loss(losses: Sequence[torch.Tensor], pg_collection: ProcessGroupCollection) -> float:
    """Average over the data-parallel ranks, and tell the ranks that are not on the last stage."""
    device = torch.device("cuda")
    loss = torch.stack(list(losses)).mean() if losses else torch.zeros((), device=device)
    if losses:
        torch.distributed.all_reduce(loss, group=pg_collection.dp_cp)
        loss /= pg_collection.dp_cp.size()
    torch.distributed.broadcast(loss, group_src=pg_collection.pp.size() - 1, group=pg_collection.pp)
    return loss.item()
