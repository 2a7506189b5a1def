"""Timeline of a pipeline: each rank runs its passes in order, each as soon as its inputs are ready."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bridge.dist.errors import LayoutError
from bridge.dist.plan.count.schedule import Pass


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
                ready = _find_ready_time(one, stage, virtual_stages, ends)
                if ready is None:
                    break
                start = max(done[-1].end, ready) if done else ready
                end = start + (forward if one.forward else backward)[rank][one.chunk]
                ends[one.forward, stage, one.microbatch] = end
                done.append(TimedPass(one, start, end))
                advanced = True
    _check_all_ran(orders, timed)
    return Timeline(timed)


def _find_ready_time(
    one: Pass, stage: int, virtual_stages: int, ends: Mapping[tuple[bool, int, int], float]
) -> float | None:
    """Return the time when the inputs of a pass are ready; None if the passes that make them have not run."""
    if one.forward:
        return ends.get((True, stage - 1, one.microbatch)) if stage > 0 else 0.0
    own = ends.get((True, stage, one.microbatch))
    if own is None or stage == virtual_stages - 1:
        return own
    later = ends.get((False, stage + 1, one.microbatch))
    return None if later is None else max(own, later)


def _check_all_ran(orders: Sequence[Sequence[Pass]], timed: Sequence[Sequence[TimedPass]]) -> None:
    stuck = [
        f"rank {rank} at the {'forward' if one.forward else 'backward'} pass of microbatch {one.microbatch} "
        f"through chunk {one.chunk}"
        for rank, (order, done) in enumerate(zip(orders, timed, strict=True))
        for one in order[len(done) : len(done) + 1]  # the next pass, if there is one
    ]
    if stuck:
        raise LayoutError(f"the pipeline schedule deadlocks; waiting: {'; '.join(stuck)}")
