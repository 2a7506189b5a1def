"""Results of a layout search: estimated step times, and why the first is fastest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from bridge.dist.layout import Layout
from bridge.dist.plan.forecast.machine import Machine
from bridge.dist.plan.forecast.timeline import timeline_of
from bridge.dist.plan.results import Plan


class Candidate(NamedTuple):
    """A layout that fits: its plan, and the estimated seconds of a step, in total and by part."""

    plan: Plan
    seconds: float
    parts: dict[str, float]

    @property
    def name(self) -> str:
        """The layout in words."""
        return str(Layout(**self.plan.layout))


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Results of a search: the layouts that fit, fastest first, and the numbers of those tried, refused, too large."""

    candidates: list[Candidate]
    tried: int
    refused: int
    too_large: int

    def explain_ranking(self) -> str | None:
        """Explain why the first is faster than the second; None if there are fewer than two."""
        if len(self.candidates) < 2:
            return None
        first, second = self.candidates[:2]
        gains = {
            part: second.parts.get(part, 0.0) - first.parts.get(part, 0.0) for part in {**first.parts, **second.parts}
        }
        differences = [
            f"{abs(gain):.3f} s {'less' if gain > 0 else 'more'} of {part}"
            for part, gain in sorted(gains.items(), key=lambda item: -abs(item[1]))
            if abs(gain) > 0.01 * first.seconds
        ]
        return f"{first.name} is faster than {second.name}: " + (", ".join(differences) or "by less than 1 %")

    def to_json(self) -> dict[str, object]:
        """Return the results as plain data."""
        return {
            "kind": "search",
            "tried": self.tried,
            "refused": self.refused,
            "too_large": self.too_large,
            "why": self.explain_ranking(),
            "candidates": [
                {
                    "layout": one.plan.layout,
                    "seconds": one.seconds,
                    "parts": one.parts,
                    "total_bytes": one.plan.worst.total_bytes,
                }
                for one in self.candidates
            ],
        }


def estimate_step(plan: Plan, machine: Machine) -> Candidate:
    """Estimate the time of a step of a plan: the work of the busiest stage, and its share of pipeline bubbles."""
    layout = Layout(**plan.layout)
    by_stage = [machine.seconds(stage, layout) for stage in plan.stages]
    busiest = max(by_stage, key=lambda seconds: sum(seconds.values()))
    # Gradients are reduced after the last pass, so no bubble waits for this traffic.
    at_end = {part: seconds for part, seconds in busiest.items() if part.startswith(("dp", "expt_dp"))}
    in_pipeline = sum(busiest.values()) - sum(at_end.values())
    # The bubble is a share of the whole time: waiting / (in_pipeline + waiting).
    bubble = timeline_of(plan).bubble
    waiting = in_pipeline * bubble / (1 - bubble)
    parts = dict(busiest) | {"pipeline bubbles": waiting}
    return Candidate(plan, sum(parts.values()), parts)
