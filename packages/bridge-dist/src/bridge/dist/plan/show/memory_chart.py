"""The chart of the memory of each stage, as stacked memory. No torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bokeh.models import ColumnDataSource, HoverTool, Range1d
from bokeh.models.annotations import Span

from bridge.dist.formatting import format_gib
from bridge.dist.plan.show.charts import Chart, add_labels, make_figure

COLOURS = {
    "weights": "#0072b2",
    "gradients": "#e69f00",
    "optimizer": "#009e73",
    "activations": "#cc79a7",
    "unsharded": "#d55e00",
    "reserve": "#9aa0a6",
}
"""Colours of the kinds of memory, distinguishable with colour blindness."""
RESERVE = "reserve"
_LIMIT_COLOUR = "#d32f2f"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The bytes of each kind of memory on a rank of each stage, the reserve, and the memory of a GPU if it is known."""

    sizes: Mapping[str, Sequence[int]]
    reserve: int
    limit: int | None

    @property
    def totals(self) -> list[int]:
        """The bytes of each stage, without the reserve."""
        return [sum(stage) for stage in zip(*self.sizes.values(), strict=True)]


def make_memory_columns(memory: Memory) -> dict[str, list[float] | list[str]]:
    """Return the columns of the chart that depend on sizes, in GiB."""
    return {
        "end": [(total + memory.reserve) / 2**30 for total in memory.totals],
        "label": [format_gib(total) for total in memory.totals],
        **{kind: [size / 2**30 for size in sizes] for kind, sizes in memory.sizes.items()},
        RESERVE: [memory.reserve / 2**30] * len(memory.totals),
    }


def make_memory_chart(name: str, memory: Memory, *, end: float) -> Chart:
    """Draw the memory of each stage, on an axis that ends at ``end`` GiB."""
    stages = [str(stage) for stage in range(len(memory.totals))]
    source = ColumnDataSource({"stage": stages, **make_memory_columns(memory)}, name=name)
    chart = make_figure(
        height=64 + len(stages) * max(14, min(26, 560 // len(stages))),
        y_range=list(reversed(stages)),
        x_range=Range1d(start=0, end=end, name="memory range"),
        x_axis_label="GiB per rank",
        y_axis_label="stage",
        tools=[HoverTool(tooltips="stage @stage: $name @$name{0,0.000} GiB of @label", point_policy="follow_mouse")],
    )
    kinds = [*memory.sizes, *([RESERVE] if memory.reserve else [])]
    colours = [COLOURS[kind] for kind in kinds]
    chart.hbar_stack(kinds, y="stage", height=0.82, source=source, color=colours, line_color=None)
    add_labels(chart, source, x="end", y="stage")
    legend = list(zip(kinds, colours, strict=True))
    if memory.limit is not None:
        limit = Span(location=memory.limit / 2**30, dimension="height", name="limit")
        limit.update(line_color=_LIMIT_COLOUR, line_width=2, line_dash="dashed")
        chart.add_layout(limit)
    return Chart(
        name=name,
        description=_describe(memory),
        model=chart,
        legend=legend,
        limit=None if memory.limit is None else f"{format_gib(memory.limit)} GiB",
    )


def _describe(memory: Memory) -> str:
    limit = "" if memory.limit is None else f" A dashed line marks the {format_gib(memory.limit)} GiB of a GPU."
    return (
        f"One bar per stage ({len(memory.totals)}), stacked: {', '.join(memory.sizes)}: from "
        f"{format_gib(min(memory.totals))} to {format_gib(max(memory.totals))} GiB.{limit}"
    )
