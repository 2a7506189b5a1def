"""Cost of a training step on a rank besides its microbatches: gradients, unsharded memory, collectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel, FullyShardedDataParallel, finalize_model_grads
from megatron.core.transformer import MegatronModule

from bridge.dist.patch import Replacement, replace_attributes
from bridge.dist.plan.count.attention import use_fused_attention
from bridge.dist.plan.count.collectives import Calls, Collectives, StepCalls, map_group_names
from bridge.dist.plan.count.memory import count_gradient_bytes, count_storage_bytes, sharded_gradients
from bridge.dist.plan.count.microbatch import Memo, PassedShapes, RankStages, Work, run_chunks
from bridge.dist.plan.count.schedule import list_passes
from bridge.dist.plan.count.unsharded import UnshardedMemory
from bridge.dist.plan.virtual_rank.peers import supply_shapes
from bridge.dist.train.optimizer import set_up_optimizer
from bridge.dist.train.step import run_microbatches, zero_gradients


class MeasuredStep(NamedTuple):
    """Cost of a microbatch in each chunk, collectives of a step, and bytes of gradients and unsharded memory."""

    works: list[Work]
    traffic: StepCalls
    gradients: int
    unsharded: int


def run_replicated(rank: RankStages, memo: Memo, passed: PassedShapes) -> MeasuredStep:
    """Measure a step with DDP or no wrapper: run a microbatch through each chunk not in ``memo``, then end the step."""
    works = run_chunks(rank, memo, passed)
    ending, more = Collectives(map_group_names(rank.groups)), Calls.empty()
    for work in works:
        more.add(work.calls)
    if isinstance(rank.stages[0], DistributedDataParallel):
        with ending:
            finalize_model_grads(list(rank.stages))
            for stage in rank.stages:
                # The distributed optimizer ends a step by gathering the updated parameters.
                if isinstance(stage, DistributedDataParallel) and stage.ddp_config.use_distributed_optimizer:
                    stage.start_param_sync(force_sync=True)
    traffic = StepCalls(microbatches=0, first=ending.calls, more=more)
    return MeasuredStep(works, traffic, count_gradient_bytes(rank.stages), 0)


def run_sharded(rank: RankStages, passed: PassedShapes) -> MeasuredStep:
    """Measure a step with Megatron-FSDP or torch FSDP2 by running whole steps: gathering depends on earlier passes."""
    fewest, round_size = _warm_up_microbatches(rank)
    wanted = rank.batch.count_microbatches(rank.layout, group_size=_group_size(rank))
    with (
        UnshardedMemory(rank.stages, [rank.groups.dp_cp, rank.groups.expt_dp]) as memory,
        set_up_optimizer(rank.stages, use_gloo_process_groups=False) as optimizer,
    ):
        _start_gathering(rank.stages)  # as the end of the previous step would
        works = run_chunks(rank, {}, passed)  # an empty memo, because gathering depends on the chunks before
        gradients, first = _end_step(rank)
        for work in works:
            first.add(work.calls)
        # In a pipeline, gathering depends on the order of the passes, so the shortest step is run as a whole.
        if rank.layout.pp > 1:
            first = _run_step(rank, min(wanted, fewest), optimizer, works)
        more = Calls.empty()
        if wanted > fewest:
            more = _run_step(rank, fewest + round_size, optimizer, works) - first
    traffic = StepCalls(microbatches=min(wanted, fewest), first=first, round_size=round_size, more=more)
    return MeasuredStep(works, traffic, gradients, memory.peak)


def _warm_up_microbatches(rank: RankStages) -> tuple[int, int]:
    """Return the number of microbatches that fill the pipeline, and that of a round; later rounds all cost the same."""
    pp, vp, group = rank.layout.pp, rank.layout.vp, _group_size(rank)
    return (1, 1) if pp == 1 else (pp, 1) if vp == 1 else (2 * group, group)


def _group_size(rank: RankStages) -> int:
    """Return the number of microbatches that a virtual stage computes in a row."""
    return rank.builder.transformer_config.microbatch_group_size_per_vp_stage or rank.layout.pp


def _end_step(rank: RankStages) -> tuple[int, Calls]:
    """End a step without the update by the optimizer; return the bytes of gradients and the collectives."""
    sent = Collectives(map_group_names(rank.groups))
    with sent:
        finalize_model_grads(list(rank.stages))
        gradients = count_storage_bytes(gradient for stage in rank.stages for gradient in sharded_gradients(stage))
        _start_gathering(rank.stages)
    return gradients, sent.calls


def _run_step(rank: RankStages, microbatches: int, optimizer: Any, works: Sequence[Work]) -> Calls:
    """Run a step without the update by the optimizer; return its collectives."""
    shape = (microbatches, rank.batch.micro_batch_size, rank.batch.seq_length + 1)
    samples = torch.empty(shape, dtype=torch.long)
    sent = Collectives(map_group_names(rank.groups))
    with sent, use_fused_attention(), replace_attributes(_supply_step_shapes(rank, microbatches, works)):
        zero_gradients(rank.stages)
        optimizer.zero_grad()
        run_microbatches(rank.stages, rank.groups, rank.layout, samples, forward_step=rank.builder.forward_step)
        _start_gathering(rank.stages)
    return sent.calls


def _supply_step_shapes(rank: RankStages, microbatches: int, works: Sequence[Work]) -> Replacement:
    """Return a replacement that supplies the shapes from neighbouring pipeline ranks, in the order of passes."""
    group_size = rank.builder.transformer_config.microbatch_group_size_per_vp_stage
    order = list_passes(rank.layout, rank.groups.pp.rank(), microbatches, group_size=group_size)
    received = (works[one.chunk].received for one in order if one.forward)
    passed_on = (works[one.chunk].passed_on for one in order if not one.forward)
    inputs, gradients = ((message.shape for message in side if message) for side in (received, passed_on))
    return supply_shapes(inputs, gradients)


def _start_gathering(stages: Sequence[MegatronModule]) -> None:
    """Start the parameter gathering that Megatron's optimizer starts at the end of a step with Megatron-FSDP."""
    for stage in stages:
        if isinstance(stage, FullyShardedDataParallel):
            wrapper: Any = stage
            wrapper.start_param_sync()
