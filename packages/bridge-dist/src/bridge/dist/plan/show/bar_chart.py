"""A chart with one bar for each of a few names, the largest first. No torch is imported."""

from __future__ import annotations

from collections.abc import Mapping

from bokeh.models import ColumnDataSource, DataRange1d, HoverTool, Range1d

from bridge.dist.formatting import format_seconds
from bridge.dist.plan.show.charts import ROOM_FOR_LABELS, Chart, add_labels, make_figure

_COLOUR = "#5b8fc7"


def label_bars(sizes: Mapping[str, float], *, unit: str) -> dict[str, list[str] | list[float]]:
    """Return the columns of the chart: the names, their sizes, and the labels with the share of each."""
    whole = sum(sizes.values())
    return {
        "name": list(sizes),
        "size": list(sizes.values()),
        "label": [f"{_format_size(size, unit)}, {size / whole if whole else 0:.1%}" for size in sizes.values()],
    }


def _format_size(size: float, unit: str) -> str:
    """Format a size; thousands need no fractions, for which the chart has no room."""
    if unit == "s" and size < 1000:
        return format_seconds(size)
    return f"{size:,.{0 if size >= 1000 else 3}f} {unit}"


def make_bar_chart(
    name: str,
    sizes: Mapping[str, float],
    *,
    unit: str,
    axis: str,
    notes: Mapping[str, str] | None = None,
    longest: float | None = None,
) -> Chart:
    """Draw a bar for each size.

    Args:
        name: The name of the chart.
        sizes: The sizes by name.
        unit: Their unit.
        axis: What the axis shows.
        notes: What a bar says besides when it is pointed at, by name.
        longest: The longest bar of charts that stand side by side, so that they have the same scale.
    """
    columns = label_bars(sizes, unit=unit)
    names = list(sizes)
    source = ColumnDataSource(columns | {"note": [(notes or {}).get(one, "") for one in names]}, name=name)
    # A label is longer than that of memory.
    room = 1.5 * (ROOM_FOR_LABELS - 1)
    axis_range: Range1d | DataRange1d = DataRange1d(start=0, range_padding=room, name="padded")
    if longest is not None:
        axis_range = Range1d(start=0, end=longest * (1 + 2 * room))  # half as wide as on a page of its own
    chart = make_figure(
        height=60 + 26 * len(names),
        y_range=list(reversed(names)),
        x_range=axis_range,
        x_axis_label=axis,
        tools=[HoverTool(tooltips="@name: @label<br>@note")],
    )
    chart.hbar(y="name", right="size", height=0.75, source=source, color=_COLOUR, line_color=None)
    add_labels(chart, source, x="size", y="name")
    said = "; ".join(f"{one} {_format_size(size, unit)}" for one, size in sizes.items())
    return Chart(name=name, description=f"One bar each, the largest first: {said}.", model=chart)
