"""The picture of the memory of each stage, as stacked bars."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, log10
from xml.etree.ElementTree import Element

from bridge.dist.formatting import format_gib
from bridge.dist.plan.results import Plan, StagePlan
from bridge.dist.plan.show.elements import GAP, ROW, make_legend, make_picture, node
from bridge.dist.plan.show.words import list_used_kinds

_KIND_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00")  # distinguishable with colour blindness
_BARS = (70, 800)
"""Left and right end of the longest bar, in a picture 900 wide."""


def make_memory_section(plan: Plan) -> Element:
    """Draw the memory per rank of each stage."""
    legend = [(kind.name, colour) for kind, colour in zip(list_used_kinds(plan), _KIND_COLOURS, strict=False)]
    return node(
        "section",
        node("h2", "Memory per rank by pipeline stage"),
        make_legend(legend),
        node("div", _draw_memory(plan), class_="scroll fit"),
        id="memory",
    )


def _draw_memory(plan: Plan) -> Element:
    left, right = _BARS
    longest = max(plan.worst.total_bytes, plan.gpu_memory or 1)
    scale = (right - left) / longest
    bottom = 24 + len(plan.stages) * ROW
    parts = [
        node("title", "Memory per rank by pipeline stage", id="memory-title"),
        node("desc", _describe_memory(plan), id="memory-desc"),
    ]
    for tick in _place_ticks(longest / 2**30):
        x = left + tick * 2**30 * scale
        parts += [
            node("line", x1=x, x2=x, y1=20, y2=bottom, class_="grid"),
            node("text", f"{tick:g}" + " GiB" * (tick == 0), x=x, y=bottom + 16, class_="middle"),  # the unit once
        ]
    parts += [_draw_stage(plan, stage, 24 + row * ROW, scale) for row, stage in enumerate(plan.stages)]
    if plan.gpu_memory is not None:
        x = left + plan.gpu_memory * scale
        anchor = "end " if x > (left + right) / 2 else ""  # the label goes to the side with more room
        parts += [
            node("line", x1=x, x2=x, y1=18, y2=bottom, class_="limit"),
            node("text", f"{format_gib(plan.gpu_memory)} GiB per GPU", x=x, y=13, class_=f"{anchor}limit-label"),
        ]
    return make_picture("memory", 900, bottom + 24, parts)


def _draw_stage(plan: Plan, stage: StagePlan, y: float, scale: float) -> Element:
    row = node("g", node("text", f"stage {stage.pp}", x=_BARS[0] - 8, y=y + 16, class_="end"), class_="stage")
    x: float = _BARS[0]
    for kind, colour in zip(list_used_kinds(plan), _KIND_COLOURS, strict=False):
        width = kind.of(stage) * scale
        tooltip = node("title", f"stage {stage.pp}: {kind.name} {format_gib(kind.of(stage))} GiB")
        row.append(
            node("rect", tooltip, x=x, y=y, width=width, height=ROW - GAP, fill=colour, class_=f"kind {kind.name}")
        )
        x += width
    too_much = plan.gpu_memory is not None and stage.total_bytes > plan.gpu_memory
    row.append(node("text", format_gib(stage.total_bytes), x=895, y=y + 16, class_="end over" if too_much else "end"))
    return row


def _describe_memory(plan: Plan) -> str:
    smallest = min(stage.total_bytes for stage in plan.stages)
    limit = "" if plan.gpu_memory is None else f" A line marks the {format_gib(plan.gpu_memory)} GiB per GPU."
    return (
        f"One bar per stage ({len(plan.stages)}), stacked: {', '.join(kind.name for kind in list_used_kinds(plan))}: "
        f"from {format_gib(smallest)} to {format_gib(plan.worst.total_bytes)} GiB.{limit} "
        "The numbers are in the table of stages."
    )


def _place_ticks(longest: float) -> Iterator[float]:
    """Yield four to nine round numbers, starting at zero."""
    # A tenth of the smallest power of ten that is at least `longest`, times the first factor that gives few enough.
    step: float = 10.0 ** ceil(log10(longest)) / 10
    step *= next(factor for factor in (0.2, 0.5, 1, 2) if longest / (step * factor) < 9)
    yield from (step * index for index in range(int(longest / step) + 1))
