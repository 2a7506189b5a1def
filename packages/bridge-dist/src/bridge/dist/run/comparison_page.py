"""The page of a comparison: plans side by side, and a table of all measures. No torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from bridge.dist.plan.show.bar_chart import make_bar_chart
from bridge.dist.plan.show.charts import ROOM_FOR_LABELS, Chart
from bridge.dist.plan.show.memory_chart import Memory, make_memory_chart
from bridge.dist.plan.show.template import render_template
from bridge.dist.plan.show.verdict import Verdict, judge_memory
from bridge.dist.run.compare import Comparison, list_rows
from bridge.dist.run.report_file import Part

_KINDS = ("weight", "gradient", "optimizer", "activation", "unsharded")
_PLURALS = {"weight": "weights", "gradient": "gradients", "activation": "activations"}


class _Job(NamedTuple):
    """What the page draws of a plan; ``command`` is None in plans of earlier versions."""

    memory: Memory
    seconds: dict[str, float]
    gib: dict[str, float]
    command: str | None

    @property
    def verdict(self) -> Verdict:
        return judge_memory(self.memory.totals, reserve=self.memory.reserve, gpu_memory=self.memory.limit)


def render_comparison_page(comparison: Comparison) -> str:
    """Return a comparison as an HTML page.

    Raises:
        DocumentError: A plan lacks what the page shows.
    """
    # The number tells files of the same name apart.
    names = [f"{index}: {file}" for index, file in enumerate(comparison.files, 1)]
    columns = {
        name: _read_job(part) if part.require("kind", str) == "plan" else None
        for name, part in zip(names, comparison.parts, strict=True)
    }
    groups = _group_charts({name: job for name, job in columns.items() if job is not None})
    return render_template(
        "comparison.html",
        title=f"Comparison of {len(names)} files",
        charts=[chart for drawn in groups.values() for chart in drawn.values()],
        data={},
        columns=columns,
        rows=[{"": label} | dict(zip(names, cells, strict=True)) for label, cells in list_rows(comparison)],
        notes=comparison.notes,
        groups=groups,
    )


def _group_charts(jobs: Mapping[str, _Job]) -> dict[str, dict[str, Chart]]:
    """Return the charts of each plan by their heading; those under a heading have the same scale."""
    if not jobs:
        return {}
    longest = max(max(max(job.memory.totals) + job.memory.reserve, job.memory.limit or 0) for job in jobs.values())
    end = longest / 2**30 * ROOM_FOR_LABELS
    return {
        "Memory per rank by pipeline stage": {
            name: make_memory_chart(f"memory-{index}", job.memory, end=end)
            for index, (name, job) in enumerate(jobs.items())
        },
        "Time of a step": _draw_bars("time", {name: job.seconds for name, job in jobs.items()}, unit="s"),
        "Largest traffic of a rank per step": _draw_bars(
            "traffic", {name: job.gib for name, job in jobs.items()}, unit="GiB"
        ),
    }


def _draw_bars(chart: str, sizes: Mapping[str, dict[str, float]], *, unit: str) -> dict[str, Chart]:
    longest = max((size for one in sizes.values() for size in one.values()), default=0.0)
    return {
        name: make_bar_chart(f"{chart}-{index}", one, unit=unit, axis=unit, longest=longest)
        for index, (name, one) in enumerate(sizes.items())
        if one
    }


def _read_job(plan: Part) -> _Job:
    stages = plan.require_mappings("stages")
    sizes = {kind: [stage.require(f"{kind}_bytes", int) for stage in stages] for kind in _KINDS}
    shown = {_PLURALS.get(kind, kind): sizes[kind] for kind in _KINDS if kind != "unsharded" or any(sizes[kind])}
    traffic: dict[str, float] = {}
    for stage in stages:
        for one in stage.require_mappings("traffic") if stage.require("traffic", list) else []:
            name = f"{one.require('group', str)}: {one.require('operation', str)}"
            traffic[name] = max(traffic.get(name, 0.0), one.require("bytes", int) / 2**30)
    time = plan.require_mapping("time").require_mapping("parts") if plan.get("time", dict) is not None else None
    return _Job(
        memory=Memory(sizes=shown, reserve=plan.require("reserve_bytes", int), limit=plan.get("gpu_memory", int)),
        seconds={} if time is None else {cause: time.require(cause, float) for cause in time.data},
        gib=dict(sorted(traffic.items(), key=lambda item: -item[1])),
        command=plan.get("command", str),
    )
