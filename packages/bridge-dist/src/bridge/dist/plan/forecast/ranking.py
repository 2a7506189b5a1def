"""Results of a search: the fastest layouts, and why the first is ahead."""

from __future__ import annotations

from dataclasses import dataclass

from bridge.dist.formatting import format_seconds
from bridge.dist.plan.forecast.space import Choice
from bridge.dist.plan.results import Plan, StepTime

_SMALLEST_CAUSE = 0.005  # of the step: smaller differences are not named


@dataclass(frozen=True)
class Candidate:
    """A planned choice and the estimated time of a step."""

    choice: Choice
    plan: Plan
    time: StepTime

    @property
    def seconds(self) -> float:
        """The estimated seconds of a step."""
        return self.time.step_seconds

    def __lt__(self, other: Candidate) -> bool:
        return (self.seconds, str(self.choice)) < (other.seconds, str(other.choice))


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Results of a search: the best layouts, fastest first, and how the other choices were decided.

    ``with_ddp`` is the fastest one with DDP if none of the best has it. ``planned`` counts the choices that were
    planned, ``refused`` those that are not possible, ``too_large`` those that do not fit, and ``slower`` those that
    were ruled out by a lower bound of their time.
    """

    candidates: list[Candidate]
    with_ddp: Candidate | None = None
    planned: int
    refused: int
    too_large: int
    slower: int

    def explain_ranking(self) -> list[str]:
        """Return how much longer each other one takes than the first, and why."""
        return [explain_difference(self.candidates[0], other) for other in self.candidates[1:]]

    def to_json(self) -> dict[str, object]:
        """Return the results as plain data."""
        return {
            "kind": "search",
            "planned": self.planned,
            "refused": self.refused,
            "too_large": self.too_large,
            "slower": self.slower,
            "why": self.explain_ranking(),
            "candidates": [_describe(one) for one in self.candidates],
            "with_ddp": None if self.with_ddp is None else _describe(self.with_ddp),
        }


def _describe(one: Candidate) -> dict[str, object]:
    return {
        "layout": one.plan.layout,
        "settings": one.choice.settings,
        "micro_batch_size": one.choice.micro_batch_size,
        "wrap": str(one.choice.wrapper),
        "distributed_optimizer": one.plan.distributed_optimizer,
        "sharding_strategy": one.plan.sharding_strategy,
        "total_bytes": one.plan.worst.total_bytes,
        "time": one.time.to_json(),
    }


def explain_difference(first: Candidate, other: Candidate) -> str:
    """Say how much longer the other takes than the first, and by which causes, the largest first."""
    ours, theirs = first.time.parts, other.time.parts
    differences = {cause: theirs.get(cause, 0.0) - ours.get(cause, 0.0) for cause in {**ours, **theirs}}
    causes = [
        f"{format_seconds(abs(seconds))} {'more' if seconds > 0 else 'less'} of {cause}"
        for cause, seconds in sorted(differences.items(), key=lambda item: -abs(item[1]))
        if abs(seconds) > _SMALLEST_CAUSE * first.seconds
    ]
    return ": ".join([f"{other.seconds / first.seconds - 1:.1%} longer", *filter(None, [", ".join(causes)])])
