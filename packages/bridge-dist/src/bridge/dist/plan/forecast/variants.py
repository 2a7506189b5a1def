"""The memory of a plan with other numbers of microbatches, which needs no new plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from bridge.dist.layout import Layout
from bridge.dist.plan.count.schedule import compute_peak, list_passes
from bridge.dist.plan.results import Plan, StagePlan

_FACTORS = (1, 2, 4, 8, 16, 32, 64)
_MOST_TIMES_PLANNED, _LEAST_FACTORS = 4, 4


def list_microbatch_counts(plan: Plan) -> list[int]:
    """Return numbers of microbatches that the schedule of a plan allows, with its own, from few to many."""
    step = (plan.microbatch_group_size or plan.layout["pp"]) if plan.layout["vp"] > 1 else 1
    fewest = max(step, plan.layout["pp"] // step * step)
    counts = [fewest * factor for factor in _FACTORS]
    near = [count for count in counts if count <= _MOST_TIMES_PLANNED * plan.microbatches]
    return sorted({plan.microbatches, *near, *counts[:_LEAST_FACTORS]})


def vary_memory(plan: Plan, counts: Sequence[int]) -> list[list[StagePlan]]:
    """Return the stages with the memory of other numbers of microbatches; their FLOPs and traffic stay the same."""
    varied = [_vary_stage(plan, stage, counts) for stage in plan.stages]
    return [list(stages) for stages in zip(*varied, strict=True)]


def _vary_stage(plan: Plan, stage: StagePlan, counts: Sequence[int]) -> Iterator[StagePlan]:
    layout = Layout(**plan.layout)
    kept, temporary = zip(*((chunk.activation_bytes, chunk.temporary_bytes) for chunk in stage.chunks), strict=True)
    peaks = {
        count: compute_peak(
            list_passes(layout, stage.pp, count, group_size=plan.microbatch_group_size), kept, temporary
        )
        for count in {plan.microbatches, *counts}
    }
    for count in counts:
        more = peaks[count] - peaks[plan.microbatches]  # what microbatches share stays
        yield replace(stage, activation_bytes=stage.activation_bytes + more, total_bytes=stage.total_bytes + more)
