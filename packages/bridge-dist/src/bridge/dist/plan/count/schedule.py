"""The order in which Megatron's schedules run the chunks of a rank, and what it keeps meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from bridge.dist.layout import Layout


class Pass(NamedTuple):
    """The forward or backward pass of a microbatch through a chunk of a rank."""

    forward: bool
    chunk: int
    microbatch: int


class _Group(NamedTuple):
    """What Megatron asks a pipeline's group for."""

    at: int
    ranks: int

    def rank(self) -> int:
        return self.at

    def size(self) -> int:
        return self.ranks


class _Communicator(NamedTuple):
    pp_group: _Group
    virtual_pipeline_model_parallel_size: int | None


def list_passes(layout: Layout, pp_rank: int, microbatches: int, *, group_size: int | None = None) -> list[Pass]:
    """Return the passes of a pipeline rank in their order, by Megatron's own tables.

    Args:
        layout: The sizes; a virtual pipeline on one rank is none.
        pp_rank: Which rank of the pipeline.
        microbatches: In a step.
        group_size: ``microbatch_group_size_per_vp_stage``, by default the pipeline's size.
    """
    if layout.pp == 1:
        return [Pass(forward, 0, index) for index in range(microbatches) for forward in (True, False)]
    chunks = layout.vp
    group_size = group_size or layout.pp
    _, _, warm_up, steady = get_pp_rank_microbatches(
        microbatches,
        chunks,
        group_size,
        p2p_communicator=_Communicator(_Group(pp_rank, layout.pp), chunks if chunks > 1 else None),  # type: ignore[arg-type]
    )
    if chunks == 1:
        table = [(index, 0) for index in range(microbatches)]
    else:
        table = get_schedule_table(microbatches, chunks, group_size)
    forward = [Pass(True, chunk, index) for index, chunk in table]
    backward = [Pass(False, chunks - 1 - chunk, index) for index, chunk in table]
    order = forward[:warm_up]
    for index in range(steady):
        order += [forward[warm_up + index], backward[index]]
    return order + backward[steady:]


def peak_kept(order: Sequence[Pass], kept: Sequence[int]) -> int:
    """Return the most that is kept at once, where a chunk keeps ``kept[chunk]`` from forward to backward pass."""
    now = highest = 0
    for one in order:
        now += kept[one.chunk] if one.forward else -kept[one.chunk]
        highest = max(highest, now)
    return highest
