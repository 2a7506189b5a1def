"""Parts that the charts of a page share: their look, and how they are written into the page. No torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, LayoutDOM
from bokeh.plotting import figure

MIDDLE_GREY = "#767676"
"""Readable on white and on black. The script of the page sets the colours of text and lines for light or dark."""

FONT = "system-ui, sans-serif"
LABEL_STYLE: dict[str, Any] = {"text_font": {"value": FONT}, "text_font_size": "12px", "text_baseline": "middle"}
ROOM_FOR_LABELS = 1.2
"""The width of a chart over that of its longest bar, whose number stands to the right of it."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart and what surrounds it: a description for those who do not see it, and the names of its colours.

    ``limit`` is what a dashed line marks, in words.
    """

    name: str
    description: str
    model: LayoutDOM
    legend: Sequence[tuple[str, str]] = ()
    limit: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the chart as BokehJS reads it."""
        return dict(json_item(self.model, theme=None))


def make_figure(*, height: int, toolbar: Literal["above"] | None = None, **options: Any) -> figure:
    """Return an empty figure that is as wide as the page and transparent."""
    made = figure(
        height=height,
        sizing_mode="stretch_width",
        toolbar_location=toolbar,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border=4,
        min_border_right=16,
        **options,
    )
    made.toolbar.logo = None
    for axis in made.axis:
        axis.update(
            axis_label_text_font_style="normal",
            axis_line_color=None,
            major_tick_line_color=None,
            minor_tick_line_color=None,
            axis_label_text_color=MIDDLE_GREY,
            major_label_text_color=MIDDLE_GREY,
            axis_label_text_font=FONT,
            major_label_text_font=FONT,
            major_label_text_font_size="12px",
            axis_label_text_font_size="12px",
        )
    made.ygrid.grid_line_color = None
    made.xgrid.grid_line_color = MIDDLE_GREY
    made.xgrid.grid_line_alpha = 0.3
    return made


def add_labels(chart: figure, source: ColumnDataSource, *, x: str, y: str) -> None:
    """Write the source's labels to the right of bars that end at ``x``."""
    chart.text(
        x=x, y=y, text="label", source=source, x_offset=5, text_color=MIDDLE_GREY, level="overlay", **LABEL_STYLE
    )
