"""The chart of the schedule of a step: an overview of all passes of every pipeline rank, and a part of it enlarged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from bokeh.layouts import column
from bokeh.models import (
    ColumnDataSource,
    FixedTicker,
    HBar,
    HoverTool,
    LinearColorMapper,
    PanTool,
    Range1d,
    RangeTool,
    ResetTool,
    WheelZoomTool,
)
from bokeh.models.renderers import GlyphRenderer
from bokeh.plotting import figure
from numpy.typing import NDArray

from bridge.dist.formatting import choose_time_unit
from bridge.dist.plan.forecast.timeline import TimedPass, Timeline
from bridge.dist.plan.results import Plan
from bridge.dist.plan.show.charts import LABEL_STYLE, MIDDLE_GREY, Chart, make_figure

_FORWARD, _BACKWARD, _WEIGHTS = (0x56, 0xB4, 0xE9), (0xF0, 0xAD, 0x1C), (0xD5, 0x6A, 0x1B)
_MAX_PASSES = 24_000
"""Maximum number of passes to draw. Each takes about 19 bytes of the page, which stays below 2 MB."""
_PASSES_IN_WINDOW = 24
"""Mean number of passes of a rank in the enlarged part at first: their numbers are readable."""
_MOST_TICKS = 32
_BAR_HEIGHT = 0.86


class _Drawn(NamedTuple):
    """The passes to draw, those of each rank in order, and the end of the drawn part."""

    ranks: Sequence[Sequence[TimedPass]]
    until: float

    @property
    def number(self) -> int:
        return sum(map(len, self.ranks))


class _Kind(NamedTuple):
    """A part of a pass: its name, its source, the columns where it starts and ends, and its colour."""

    name: str
    source: ColumnDataSource
    left: str
    right: str
    colour: tuple[int, int, int]


def make_schedule_chart(plan: Plan, timeline: Timeline, *, is_timed: bool) -> Chart:
    """Draw the passes of a step, up to a number that a browser can handle.

    Args:
        plan: The plan.
        timeline: The timeline of its passes.
        is_timed: Whether the timeline is in seconds; otherwise, parts of the whole are shown.
    """
    chunks = max(len(stage.chunks) for stage in plan.stages)
    drawn, ranks = _select_passes(timeline), len(timeline.ranks)
    scale, unit = choose_time_unit(timeline.length) if is_timed else (100 / timeline.length, "%")
    end = drawn.until * scale
    forward, backward = _make_sources(plan, drawn, scale)
    kinds = (
        _Kind("forward", forward, "left", "right", _FORWARD),
        _Kind("backward, gradients of inputs", backward, "left", "split", _BACKWARD),
        _Kind("backward, gradients of weights", backward, "split", "right", _WEIGHTS),
    )
    first, last = (scale * edge for edge in _choose_window(drawn))
    window = Range1d(start=first, end=last, bounds=(0, end), name="window")
    overview, zoomed = _make_overview(ranks, end, window), _make_enlarged(ranks, window)
    zoomed.xaxis.axis_label = f"time of the passes, {unit}" if is_timed else "share of the passes, %"
    for chart in (overview, zoomed):
        _draw_bubbles(chart, ranks, end, hatch=chart is zoomed)
    for kind in kinds:
        _draw_passes(overview, kind, chunks)
        bars = _draw_passes(zoomed, kind, chunks)
        tooltip = (
            f"stage @rank: {kind.name}<br>microbatch @microbatch, chunk @chunk<br>"
            f"@left{{0.00}} to @right{{0.00}} {unit}"
        )
        zoomed.add_tools(HoverTool(tooltips=tooltip, renderers=[bars], visible=False))
    _add_numbers(zoomed)
    missing = sum(map(len, timeline.ranks)) - drawn.number
    share = f"{drawn.until / timeline.length:.1%}"
    scope = f" The first {share} of the step are drawn; {missing:,} later passes are not." if missing else ""
    return Chart(
        name="schedule",
        description=(
            f"One row for each of {ranks} pipeline ranks; time runs to the right. Hatched parts are pipeline bubbles, "
            f"in which a rank waits.{scope}"
        ),
        model=column(overview, zoomed, sizing_mode="stretch_width"),
        legend=[*((kind.name, _tint(kind.colour, 0, chunks)) for kind in kinds), ("bubble", "")],
    )


def _select_passes(timeline: Timeline) -> _Drawn:
    starts = sorted(one.start for rank in timeline.ranks for one in rank)
    if len(starts) <= _MAX_PASSES:
        return _Drawn(timeline.ranks, timeline.length)
    # All ranks end at the same time, so that the picture of a long schedule is not ragged.
    until = starts[_MAX_PASSES]
    return _Drawn([[one for one in rank if one.start < until] for rank in timeline.ranks], until)


def _choose_window(drawn: _Drawn) -> tuple[float, float]:
    """Return the part to enlarge at first: about the first backward pass, where a pipeline is full."""
    width = min(drawn.until, drawn.until * _PASSES_IN_WINDOW * len(drawn.ranks) / drawn.number)
    first_backward = min((one.start for rank in drawn.ranks for one in rank if not one.pass_.forward), default=0.0)
    start = min(max(first_backward - width / 2, 0), drawn.until - width)
    return start, start + width


def _make_enlarged(ranks: int, window: Range1d) -> figure:
    chart = make_figure(
        height=84 + ranks * max(9, min(26, 560 // ranks)),
        toolbar="above",
        x_range=window,
        y_range=Range1d(start=ranks - 0.5, end=-0.5),
        y_axis_label="stage",
        tools=[
            PanTool(dimensions="width"),
            WheelZoomTool(dimensions="width", modifiers={"ctrl": True}),
            ResetTool(),
        ],
    )
    chart.yaxis.ticker = FixedTicker(ticks=list(range(0, ranks, -(-ranks // _MOST_TICKS))))
    return chart


def _make_overview(ranks: int, end: float, window: Range1d) -> figure:
    chart = make_figure(
        height=40 + ranks * max(2, min(7, 160 // ranks)),
        x_range=Range1d(start=0, end=end),
        y_range=Range1d(start=ranks - 0.5, end=-0.5),
        tools=[],
    )
    chart.yaxis.ticker = FixedTicker(ticks=[])
    chart.xgrid.visible = False
    selection = RangeTool(x_range=window, start_gesture="pan")
    selection.overlay.update(fill_color=MIDDLE_GREY, fill_alpha=0.25, line_color=MIDDLE_GREY, line_alpha=1)
    chart.add_tools(selection)
    return chart


def _draw_bubbles(chart: figure, ranks: int, end: float, *, hatch: bool) -> None:
    """Draw what is seen where no pass runs."""
    chart.hbar(
        y=list(range(ranks)),
        left=0,
        right=end,
        height=_BAR_HEIGHT,
        fill_color=MIDDLE_GREY,
        fill_alpha=0.15,
        line_color=None,
        hatch_pattern="right_diagonal_line" if hatch else None,
        hatch_color=MIDDLE_GREY,
        hatch_alpha=0.35,
        hatch_scale=6,
    )


def _draw_passes(chart: figure, kind: _Kind, chunks: int) -> GlyphRenderer[HBar]:
    palette = [_tint(kind.colour, chunk, chunks) for chunk in range(chunks)]
    mapper = LinearColorMapper(low=-0.5, high=chunks - 0.5, palette=palette)
    return chart.hbar(
        y="rank",
        left=kind.left,
        right=kind.right,
        height=_BAR_HEIGHT,
        source=kind.source,
        fill_color={"field": "chunk", "transform": mapper},
        line_color=None,
    )


def _make_sources(plan: Plan, drawn: _Drawn, scale: float) -> tuple[ColumnDataSource, ColumnDataSource]:
    """Return the forward and the backward passes, with scaled times.

    The types are small, because the page holds every number.
    """
    # A backward pass computes the two kinds of gradients in turns; it is drawn in two parts to show their shares.
    shares = {
        (stage.pp, chunk.vp_stage): 1 - chunk.weight_gradient_flops / max(chunk.flops - chunk.forward_flops, 1)
        for stage in plan.stages
        for chunk in stage.chunks
    }

    def make_source(name: str, *, forward: bool) -> ColumnDataSource:
        passes = [
            (rank, one) for rank, timed in enumerate(drawn.ranks) for one in timed if one.pass_.forward is forward
        ]

        def make_column(values: Sequence[float], kind: type[np.generic]) -> NDArray[np.generic]:
            return np.array(values, dtype=kind)

        columns = {
            "rank": make_column([rank for rank, _ in passes], np.uint16),
            "left": make_column([one.start * scale for _, one in passes], np.float32),
            "right": make_column([min(one.end, drawn.until) * scale for _, one in passes], np.float32),
            "microbatch": make_column([one.pass_.microbatch for _, one in passes], np.uint16),
            "chunk": make_column([one.pass_.chunk for _, one in passes], np.uint8),
        }
        if not forward:
            splits = [one.start + (one.end - one.start) * shares[rank, one.pass_.chunk] for rank, one in passes]
            columns["split"] = make_column([min(split, drawn.until) * scale for split in splits], np.float32)
        return ColumnDataSource(columns, name=name)

    return make_source("forward", forward=True), make_source("backward", forward=False)


def _add_numbers(chart: figure) -> None:
    """Add the numbers of microbatches; the script of the page places those that are in the window and have room."""
    chart.text(
        x="x",
        y="y",
        text="label",
        source=ColumnDataSource({"x": [], "y": [], "label": []}, name="labels"),
        text_align="center",
        text_color="#111111",
        name="on colour",
        **LABEL_STYLE,
    )


def _tint(colour: tuple[int, int, int], chunk: int, chunks: int) -> str:
    """Return a colour that is paler for later chunks, on which dark text stays readable."""
    share = 0.7 * chunk / max(chunks - 1, 1)
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in colour)
