"""Compute the logits of a whole model under any layout, with Megatron's own schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

from bridge.dist.engine.forward import ForwardStep
from bridge.dist.engine.stages import unwrap
from bridge.dist.layout import Layout


@torch.no_grad()
def compute_logits(
    stages: list[MegatronModule],
    pg_collection: ProcessGroupCollection,
    layout: Layout,
    tokens: torch.Tensor,
    *,
    logits_step: ForwardStep,
) -> torch.Tensor | None:
    """Run the forward pass of a model. Collective: every rank of the layout passes the same tokens.

    Args:
        stages: The stages of this rank, wrapped or not.
        pg_collection: The process groups of this rank.
        layout: Its pipeline sizes select the schedule.
        tokens: [microbatches, micro batch size, sequence].
        logits_step: ``logits_step`` of the builder that made the stages.

    Returns:
        On the last pipeline stage the logits, [samples, sequence, padded vocabulary]; None on other stages.
    """
    schedule = get_forward_backward_func(pp_size=layout.pp, vp_size=layout.vp if layout.vp > 1 else None)
    outputs: list[torch.Tensor] = schedule(
        forward_step_func=partial(_forward, logits_step=logits_step, pg_collection=pg_collection),
        data_iterator=[iter(tokens) for _ in stages] if len(stages) > 1 else iter(tokens),
        model=stages,
        num_microbatches=tokens.shape[0],
        seq_length=tokens.shape[2],
        micro_batch_size=tokens.shape[1],
        forward_only=True,
        collect_non_loss_data=True,
    )
    if pg_collection.pp.rank() != pg_collection.pp.size() - 1:
        return None
    logits = torch.cat(outputs)
    if unwrap(stages[-1]).parallel_output:
        logits = torch.cat(_gather(logits, pg_collection.tp), dim=-1)
    return _join_sequence(_gather(logits, pg_collection.cp))


def _forward(
    samples: Iterator[torch.Tensor],
    stage: MegatronModule,
    *,
    logits_step: ForwardStep,
    pg_collection: ProcessGroupCollection,
) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
    # The schedule calls a loss function on the last stage, and collects what it returns.
    def return_logits(logits: torch.Tensor, *, non_loss_data: bool) -> torch.Tensor:
        assert non_loss_data
        return logits

    return logits_step(stage, next(samples).to(torch.device("cuda")), pg_collection), return_logits


def _gather(tensor: torch.Tensor, group: torch.distributed.ProcessGroup) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def _join_sequence(parts: list[torch.Tensor]) -> torch.Tensor:
    """Join the parts of n context-parallel ranks: rank r holds the chunks r and 2 n - 1 - r of 2 n of a sequence."""
    if len(parts) == 1:
        return parts[0]
    halves = [part.chunk(2, dim=1) for part in parts]
    return torch.cat([*(first for first, _ in halves), *(second for _, second in reversed(halves))], dim=1)
