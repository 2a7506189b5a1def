"""The picture of the schedule of a step: one row of passes for each pipeline rank."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from bridge.dist.plan.forecast.timeline import TimedPass, Timeline
from bridge.dist.plan.results import Plan
from bridge.dist.plan.show.elements import GAP, ROW, make_legend, make_picture, node

_FORWARD, _BACKWARD = (0x56, 0xB4, 0xE9), (0xE6, 0x9F, 0x00)
_MAX_PASSES = 2400
"""Maximum number of passes to draw: more make a browser slow."""
_MEAN_PASS_WIDTH, _MIN_WIDTH = 27, 750
"""Mean width of a pass, and minimum width of the schedule."""


def make_schedule_section(plan: Plan, timeline: Timeline) -> Element:
    """Draw the passes of a step, up to a number that a browser can handle."""
    chunks = max(len(stage.chunks) for stage in plan.stages)
    until = _last_drawn_time(timeline)
    drawn = [[one for one in rank if one.start < until] for rank in timeline.ranks]
    missing = sum(map(len, timeline.ranks)) - sum(map(len, drawn))
    if missing:
        scope = f"The first {until / timeline.length:.1%} of the step is shown; {missing:,} later passes are not."
    else:
        scope = "The whole step is shown."
    numbers = "Each number is a microbatch"
    numbers += " and, below it, a chunk of the rank; later chunks are paler." if chunks > 1 else "."
    legend = [
        ("forward", _tint(_FORWARD, 0, chunks)),
        ("backward", _tint(_BACKWARD, 0, chunks)),
        ("bubble", "url(#hatch)"),
    ]
    return node(
        "section",
        node("h2", "Schedule of a step"),
        node("p", f"{numbers} Hatched areas are pipeline bubbles, in which a rank waits. {scope}", id="schedule-scope"),
        make_legend(legend),
        node(
            "div",
            _draw_stage_names(timeline),
            _draw_schedule(drawn, until, chunks, scope),
            class_="scroll pipeline",
            tabindex="0",
            role="region",
            aria_label="Schedule of a step, scrolls sideways",
        ),
        id="schedule",
    )


def _last_drawn_time(timeline: Timeline) -> float:
    starts = sorted(one.start for rank in timeline.ranks for one in rank)
    # All ranks end at the same time, so that the picture of a long schedule is not ragged.
    return timeline.length if len(starts) <= _MAX_PASSES else starts[_MAX_PASSES]


def _draw_stage_names(timeline: Timeline) -> Element:
    names = [
        node("text", f"stage {rank}, {bubble:.1%} idle", x=0, y=rank * ROW + 15)
        for rank, bubble in enumerate(timeline.bubbles)
    ]
    return node("svg", *names, width=130, height=len(names) * ROW, class_="names", aria_hidden="true")


def _draw_schedule(ranks: Sequence[Sequence[TimedPass]], until: float, chunks: int, scope: str) -> Element:
    lengths = [one.end - one.start for rank in ranks for one in rank]
    scale = max(_MEAN_PASS_WIDTH * len(lengths) / sum(lengths), _MIN_WIDTH / until) if until else 1.0
    width = until * scale
    stripes = node(
        "pattern",
        node("rect", width=6, height=6, class_="hatch-back"),
        node("line", x1=0, x2=0, y1=0, y2=6, class_="hatch-line"),
        id="hatch",
        width=6,
        height=6,
        patternUnits="userSpaceOnUse",
        patternTransform="rotate(45)",
    )
    description = f"One row for each of {len(ranks)} pipeline ranks; time runs to the right. {scope}"
    parts = [
        node("title", "Forward and backward passes of each pipeline rank", id="schedule-title"),
        node("desc", f"{description} The table of stages has the idle time of each rank.", id="schedule-desc"),
        node("defs", stripes),
    ]
    for rank, timed in enumerate(ranks):
        y, height = rank * ROW, ROW - GAP
        parts.append(node("rect", x=0, y=y, width=width, height=height, class_="bubble"))
        parts += [_draw_pass(one, y, scale, min(one.end, until) * scale, chunks) for one in timed]
    picture = make_picture("schedule", width, len(ranks) * ROW, parts)
    picture.set("width", f"{width:.7g}")
    picture.set("height", str(len(ranks) * ROW))
    return picture


def _draw_pass(one: TimedPass, y: float, scale: float, end: float, chunks: int) -> Element:
    pass_, start = one.pass_, one.start * scale
    name, colour = ("forward", _FORWARD) if pass_.forward else ("backward", _BACKWARD)
    of_chunk = f", chunk {pass_.chunk}" if chunks > 1 else ""
    drawn = node(
        "g",
        node("title", f"{name}, microbatch {pass_.microbatch}{of_chunk}"),
        node("rect", x=start, y=y, width=end - start, height=ROW - GAP, fill=_tint(colour, pass_.chunk, chunks)),
        class_=f"pass {name}",
    )
    if end - start > 7 * len(str(pass_.microbatch)):  # a digit is less than 7 wide; a longer label would not fit
        labels = [str(pass_.microbatch), str(pass_.chunk)] if chunks > 1 else [str(pass_.microbatch)]
        top = y + (10 if chunks > 1 else 15)
        middle = (start + end) / 2
        drawn.extend(node("text", label, x=middle, y=top + 10 * line) for line, label in enumerate(labels))
    return drawn


def _tint(colour: tuple[int, int, int], chunk: int, chunks: int) -> str:
    """Return a colour that is paler for later chunks, on which dark text stays readable."""
    share = 0.7 * chunk / max(chunks - 1, 1)
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in colour)
