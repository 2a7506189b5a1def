"""When each pass of a pipeline runs: the passes of a rank in their order, each once what it needs is there.

An estimate: a pass takes what it is said to, on every rank alike, and what ranks send each other takes no time.
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
    """A pass, from when to when, in the unit of its cost."""

    what: Pass
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step: the passes of each pipeline rank, in order. It starts at 0."""

    ranks: list[list[TimedPass]]

    @property
    def length(self) -> float:
        """When the last pass ends."""
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
    """Return the step of a plan, in FLOPs of a rank: a pass takes as long as its FLOPs are many."""
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
    """Run the passes of every pipeline rank in its order, each as soon as its rank is free and its input is there.

    The forward pass of a chunk needs that of the rank before it, on the first rank that of the chunk before it on the
    last rank; the backward pass needs that of the chunk that comes after it, and its own forward pass.

    Args:
        orders: The passes of each rank.
        forward: What a forward pass costs, by rank and chunk, in any unit of time.
        backward: What a backward pass costs, likewise.

    Raises:
        LayoutError: The orders wait for each other in a circle, or for a pass that is in none.
    """
    timed: list[list[TimedPass]] = [[] for _ in orders]
    ends: dict[tuple[bool, int, int], float] = {}  # by direction, virtual stage and microbatch
    virtual_stages = len(orders) * len(forward[0])
    advanced = True
    while advanced:
        advanced = False
        for rank, order in enumerate(orders):
            done = timed[rank]
            while len(done) < len(order):
                one = order[len(done)]
                stage = one.chunk * len(orders) + rank
                prerequisites = list(_prerequisites(one, stage, virtual_stages))
                if any(need not in ends for need in prerequisites):
                    break
                start = max([done[-1].end if done else 0.0, *(ends[need] for need in prerequisites)])
                end = start + (forward if one.forward else backward)[rank][one.chunk]
                ends[one.forward, stage, one.microbatch] = end
                done.append(TimedPass(one, start, end))
                advanced = True
    _check_all_ran(orders, timed)
    return Timeline(timed)


def _prerequisites(one: Pass, stage: int, virtual_stages: int) -> Iterator[tuple[bool, int, int]]:
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
        for one in order[len(done) : len(done) + 1]
    ]
    if stuck:
        raise LayoutError(f"the pipeline's schedule never ends: its ranks wait for each other: {'; '.join(stuck)}")
