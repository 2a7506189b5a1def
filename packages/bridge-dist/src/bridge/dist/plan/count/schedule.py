"""The order of passes in Megatron's pipeline schedules, and the peak memory that they keep."""

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
    """Stand-in for the process group of a pipeline, with the methods that Megatron's schedule calls."""

    rank_index: int
    ranks: int

    def rank(self) -> int:
        return self.rank_index

    def size(self) -> int:
        return self.ranks


class _Communicator(NamedTuple):
    """Stand-in for ``P2PCommunicator``, with the attributes that Megatron's schedule reads."""

    pp_group: _Group
    virtual_pipeline_model_parallel_size: int | None


def list_passes(layout: Layout, pp_rank: int, microbatches: int, *, group_size: int | None = None) -> list[Pass]:
    """Return the passes of a pipeline rank in order, from Megatron's own tables.

    Args:
        layout: The sizes of the job; vp is ignored if pp is 1.
        pp_rank: The pipeline rank.
        microbatches: The number of microbatches in a step.
        group_size: ``microbatch_group_size_per_vp_stage``, by default the pipeline-parallel size.
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
    # Backward passes take the chunks in reverse.
    backward = [Pass(False, chunks - 1 - chunk, index) for index, chunk in table]
    # One forward, one backward (1F1B): after the warm-up, they alternate, and the remaining backward passes come last.
    order = forward[:warm_up]
    for index in range(steady):
        order += [forward[warm_up + index], backward[index]]
    return order + backward[steady:]


def compute_peak(order: Sequence[Pass], kept: Sequence[int], temporary: Sequence[int]) -> int:
    """Return the peak bytes of activations on a rank.

    Args:
        order: The passes of the rank.
        kept: By chunk, the bytes that a microbatch keeps between its two passes.
        temporary: By chunk, the bytes that its backward pass takes beside them.
    """
    now = highest = 0
    for one in order:
        if one.forward:
            now += kept[one.chunk]
            highest = max(highest, now)
        else:
            highest = max(highest, now + temporary[one.chunk])
            now -= kept[one.chunk]
    return highest
