"""Timeline of a pipeline: each rank runs its passes in order, each as soon as its inputs are ready.

This is an estimate: passes take the given time, and communication takes none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bridge.dist.errors import LayoutError
from bridge.dist.layout import Layout
from bridge.dist.plan.count.schedule import Pass, list_passes
from bridge.dist.plan.results import Plan


class TimedPass(NamedTuple):
    """A pass with its start and end, in the unit of its cost."""

    pass_: Pass
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step, starting at 0: the timed passes of each pipeline rank, in order."""

    ranks: list[list[TimedPass]]

    @property
    def length(self) -> float:
        """The end of the last pass."""
        return max((rank[-1].end for rank in self.ranks if rank), default=0.0)

    @property
    def bubbles(self) -> list[float]:
        """For each rank, the share of the step in which it runs no pass."""
        length = self.length
        busy = [sum(one.end - one.start for one in rank) for rank in self.ranks]
        return [1 - time / length if length else 0.0 for time in busy]

    @property
    def bubble(self) -> float:
        """The share of the step in bubbles, over all ranks."""
        return sum(self.bubbles) / len(self.ranks)


def timeline_of(plan: Plan) -> Timeline:
    """Return the timeline of a plan's step; the time of a pass is its number of FLOPs."""
    layout = Layout(**plan.layout)
    return simulate(
        [
            list_passes(layout, stage.pp, plan.microbatches, group_size=plan.microbatch_group_size)
            for stage in plan.stages
        ],
        forward=[[chunk.forward_flops for chunk in stage.chunks] for stage in plan.stages],
        backward=[[chunk.flops - chunk.forward_flops for chunk in stage.chunks] for stage in plan.stages],
    )


def simulate(
    orders: Sequence[Sequence[Pass]], *, forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]]
) -> Timeline:
    """Time the passes of every pipeline rank in order, each as soon as its rank is free and its input is ready.

    A forward pass needs the forward pass of the previous virtual stage. A backward pass needs the backward pass of the
    next virtual stage, and its own forward pass.

    Args:
        orders: The passes of each rank.
        forward: Time of a forward pass by rank and chunk, in any unit.
        backward: Time of a backward pass, likewise.

    Raises:
        LayoutError: The orders deadlock, or need a pass that none of them contains.
    """
    timed: list[list[TimedPass]] = [[] for _ in orders]
    ends: dict[tuple[bool, int, int], float] = {}  # by direction, virtual stage and microbatch
    virtual_stages = len(orders) * len(forward[0])
    # Each round runs every rank as far as possible, until nothing advances: all passes ran, or the orders deadlock.
    advanced = True
    while advanced:
        advanced = False
        for rank, order in enumerate(orders):
            done = timed[rank]
            while len(done) < len(order):
                one = order[len(done)]
                stage = one.chunk * len(orders) + rank
                prerequisites = list(_list_prerequisites(one, stage, virtual_stages))
                if any(need not in ends for need in prerequisites):
                    break
                start = max([done[-1].end if done else 0.0, *(ends[need] for need in prerequisites)])
                end = start + (forward if one.forward else backward)[rank][one.chunk]
                ends[one.forward, stage, one.microbatch] = end
                done.append(TimedPass(one, start, end))
                advanced = True
    _check_all_ran(orders, timed)
    return Timeline(timed)


def _list_prerequisites(one: Pass, stage: int, virtual_stages: int) -> Iterator[tuple[bool, int, int]]:
    if one.forward:
        if stage > 0:
            yield True, stage - 1, one.microbatch
        return
    yield True, stage, one.microbatch
    if stage < virtual_stages - 1:
        yield False, stage + 1, one.microbatch


def _check_all_ran(orders: Sequence[Sequence[Pass]], timed: Sequence[Sequence[TimedPass]]) -> None:
    stuck = [
        f"rank {rank} at the {'forward' if one.forward else 'backward'} pass of microbatch {one.microbatch} "
        f"through chunk {one.chunk}"
        for rank, (order, done) in enumerate(zip(orders, timed, strict=True))
        for one in order[len(done) : len(done) + 1]  # the next pass, if there is one
    ]
    if stuck:
        raise LayoutError(f"the pipeline schedule deadlocks; waiting: {'; '.join(stuck)}")
