"""What the page shows for other numbers of microbatches and other machines, computed without new plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bridge.dist.formatting import format_gib, format_seconds
from bridge.dist.plan.forecast.machine import Machine, list_machines, load_machine
from bridge.dist.plan.forecast.step_time import BUBBLE, compute_training_cost, estimate_time
from bridge.dist.plan.forecast.variants import list_microbatch_counts, vary_memory
from bridge.dist.plan.results import Plan, StagePlan, StepTime
from bridge.dist.plan.show.bar_chart import label_bars
from bridge.dist.plan.show.charts import ROOM_FOR_LABELS
from bridge.dist.plan.show.memory_chart import Memory, make_memory_columns
from bridge.dist.plan.show.verdict import judge_memory
from bridge.dist.plan.show.words import list_used_kinds


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A cell for each machine and number of microbatches, and the position of the planned one.

    ``memory`` has the columns of the chart of memory for each number of microbatches.
    """

    machines: list[str]
    counts: list[int]
    memory: list[dict[str, Any]]
    cells: list[list[dict[str, Any]]]
    machine: int
    count: int

    @property
    def planned(self) -> dict[str, Any]:
        """The cell of the plan itself."""
        return self.cells[self.machine][self.count]

    def to_json(self) -> dict[str, Any]:
        """Return what the script of the page reads."""
        return {"counts": self.counts, "memory": self.memory, "cells": self.cells}


def make_grid(plan: Plan, machine: Machine | None) -> Grid:
    """Return the plan and its variants; without a machine they have no times."""
    counts = list_microbatch_counts(plan)
    by_count = list(zip(counts, vary_memory(plan, counts), strict=True))
    machines = [machine]
    if machine is not None:
        others = [load_machine(name) for name in list_machines() if name != machine.name]
        has_fp8 = "float8" in plan.product_dtypes
        machines += [one for one in others if one.fp8_flops is not None or not has_fp8]
    return Grid(
        machines=[one.name for one in machines if one is not None],
        counts=counts,
        memory=[make_memory_columns(describe_memory(replace(plan, stages=stages))) for _, stages in by_count],
        cells=[_make_row(plan, by_count, one, is_planned=one is machine) for one in machines],
        machine=0,
        count=counts.index(plan.microbatches),
    )


def describe_memory(plan: Plan) -> Memory:
    """Return the memory of the stages as the chart draws it."""
    sizes = {kind.name: [kind.of(stage) for stage in plan.stages] for kind in list_used_kinds(plan)}
    return Memory(sizes=sizes, reserve=plan.reserve_bytes, limit=plan.gpu_memory)


def _make_row(
    plan: Plan, by_count: Sequence[tuple[int, list[StagePlan]]], machine: Machine | None, *, is_planned: bool
) -> list[dict[str, Any]]:
    gpu_memory = plan.gpu_memory if is_planned or machine is None else machine.memory
    longest = plan.reserve_bytes + max(stage.total_bytes for _, stages in by_count for stage in stages)
    shared = {
        "limit": "" if gpu_memory is None else f"{format_gib(gpu_memory)} GiB",
        "limit_gib": None if gpu_memory is None else gpu_memory / 2**30,
        "end": max(longest, gpu_memory or 0) / 2**30 * ROOM_FOR_LABELS,
    }
    cells = []
    for count, stages in by_count:
        totals = [stage.total_bytes for stage in stages]
        verdict = judge_memory(totals, reserve=plan.reserve_bytes, gpu_memory=gpu_memory)
        cell: dict[str, Any] = {
            **shared,
            **verdict._asdict(),
            "numbers": {"largest rank": f"{format_gib(max(totals))} GiB"},
        }
        if machine is not None:
            time = estimate_time(plan, machine, microbatches=count)
            cell["numbers"] |= _list_times(plan, time)
            cell["validated"] = f"Times are estimates for {machine.name}: {time.validated}."
            cell["time"] = label_bars(time.parts, unit="s")
        cell["numbers"]["global batch"] = f"{count * plan.global_batch_size // plan.microbatches:,}"
        cells.append(cell)
    return cells


def _list_times(plan: Plan, time: StepTime) -> dict[str, str]:
    numbers = {
        "step": format_seconds(time.step_seconds),
        "tokens/s per GPU": f"{time.tokens_per_second_per_gpu:,.0f}",
        "model-FLOPs utilisation": f"{time.model_flops_utilization:.1%}",
        "pipeline bubble": f"{time.parts.get(BUBBLE, 0) / time.step_seconds:.1%}",
    }
    asked = plan.time.training if plan.time is not None else None
    if asked is not None:
        training = compute_training_cost(plan, time, tokens=asked.tokens, price=asked.price)
        numbers["training"] = f"{training.days:,.1f} days"
        numbers["GPU-hours"] = f"{training.gpu_hours:,.0f}"
        if training.cost is not None:
            numbers["cost"] = f"{training.cost:,.0f}"
    return numbers
