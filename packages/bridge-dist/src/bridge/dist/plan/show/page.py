"""A plan as one page that needs nothing else: memory by stage and the schedule drawn, the numbers to copy.

The page is made of elements, so that every text is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import ceil, log10
from xml.etree.ElementTree import Element, tostring

from bridge.dist.format import gib, layer_ranges
from bridge.dist.plan.forecast.timeline import TimedPass, Timeline, timeline_of
from bridge.dist.plan.results import Plan, StagePlan
from bridge.dist.plan.show.words import kinds_of, statements

_KIND_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00")  # told apart by colour-blind people too
_FORWARD, _BACKWARD = (0x56, 0xB4, 0xE9), (0xE6, 0x9F, 0x00)
_MOST_PASSES = 2400
"""How many passes are drawn: more, and a browser gets slow."""
_ROW, _GAP = 26, 4
_MEAN_PASS, _NARROWEST = 27, 750
"""How wide a pass is on average, and the whole schedule at least."""
_BARS = (70, 800)
"""From where to where the bars of memory go, in a picture 900 wide."""

_STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --page: #fff; --faint: #ececec; --line: #8a8a8a; --limit: #c00000; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --page: #16181c; --faint: #2b2f36; --line: #7d838c; --limit: #ff6b6b; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.5rem; }
dt { font-weight: 600; }
dd { margin: 0; }
svg { display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--text); }
svg .pass text { font-size: 10px; fill: #111; text-anchor: middle; }
svg .pass rect { stroke: var(--page); stroke-width: .5; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--faint); }
svg .limit { stroke: var(--limit); stroke-width: 2; stroke-dasharray: 6 3; }
svg .over, svg text.limit-label { fill: var(--limit); font-weight: 600; stroke: none; }
svg .bubble { fill: url(#hatch); }
svg .hatch-back { fill: var(--faint); }
svg .hatch-line { stroke: var(--line); stroke-width: .7; }
.fit svg { width: 100%; min-width: 40rem; height: auto; }
.scroll { overflow-x: auto; }
.pipeline { display: flex; }
.pipeline svg { flex: none; }
.pipeline .names { position: sticky; left: 0; background: var(--page); }
ul.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; list-style: none; padding: 0; }
ul.legend svg { display: inline-block; vertical-align: -2px; margin-right: .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid var(--faint); font-weight: normal; }
thead th { font-weight: 600; }
td.words { text-align: left; }
td span + span { margin-left: .2em; }
summary { cursor: pointer; font-weight: 600; margin-top: 1rem; }
"""

# Of what a script may do here, the deprecated command alone works in pages opened from a file, in every browser.
_SCRIPT = """
for (const button of document.querySelectorAll("button[data-table]")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    getSelection().selectAllChildren(document.getElementById(button.dataset.table));
    button.textContent = document.execCommand("copy") ? "Copied" : "Selected: copy it";
  });
}
"""


def page(plan: Plan, title: str) -> str:
    """Return a plan as an HTML page, under a title such as the name of its file."""
    timeline = planned(plan)
    head = _node(
        "head",
        _node("meta", charset="utf-8"),
        _node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _node(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'",
        ),
        _node("title", f"Plan of {title}"),
        _node("style", _STYLE),
    )
    words = [
        part
        for subject, statement in statements(plan, timeline).items()
        for part in (_node("dt", subject), _node("dd", statement))
    ]
    body = _node(
        "body",
        _node(
            "main",
            _node("h1", f"Plan of {title}"),
            _node("dl", *words),
            _memory_section(plan),
            _schedule_section(plan, timeline),
            _numbers_section(plan, timeline),
        ),
        _node("script", _SCRIPT),
    )
    return "<!doctype html>\n" + tostring(_node("html", head, body, lang="en"), encoding="unicode", method="html")


def _node(tag: str, *children: Element | str, **attributes: str | float) -> Element:
    """Make an element; ``_`` in the name of an attribute stands for ``-``, and is dropped at its end."""
    made = Element(tag)
    for name, value in attributes.items():
        written = value if isinstance(value, str) else f"{value:.7g}"
        made.set(name.rstrip("_").replace("_", "-"), written)
    for child in children:
        if not isinstance(child, str):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


def _memory_section(plan: Plan) -> Element:
    legend = [(kind.name, colour) for kind, colour in zip(kinds_of(plan), _KIND_COLOURS, strict=False)]
    return _node(
        "section",
        _node("h2", "Memory of a rank by pipeline stage"),
        _legend(legend),
        _node("div", _memory_picture(plan), class_="scroll fit"),
        id="memory",
    )


def _memory_picture(plan: Plan) -> Element:
    left, right = _BARS
    longest = max(plan.worst.total_bytes, plan.gpu_memory or 1)
    scale = (right - left) / longest
    bottom = 24 + len(plan.stages) * _ROW
    parts = [
        _node("title", "Memory of a rank by pipeline stage", id="memory-title"),
        _node("desc", _memory_description(plan), id="memory-desc"),
    ]
    for tick in _ticks(longest / 2**30):
        x = left + tick * 2**30 * scale
        parts += [
            _node("line", x1=x, x2=x, y1=20, y2=bottom, class_="grid"),
            _node("text", f"{tick:g}" + " GiB" * (tick == 0), x=x, y=bottom + 16, class_="middle"),
        ]
    parts += [_memory_row(plan, stage, 24 + row * _ROW, scale) for row, stage in enumerate(plan.stages)]
    if plan.gpu_memory is not None:
        x = left + plan.gpu_memory * scale
        anchor = "end " if x > (left + right) / 2 else ""  # there is room on this side
        parts += [
            _node("line", x1=x, x2=x, y1=18, y2=bottom, class_="limit"),
            _node("text", f"{gib(plan.gpu_memory)} GiB of a GPU", x=x, y=13, class_=f"{anchor}limit-label"),
        ]
    return _picture("memory", 900, bottom + 24, parts)


def _memory_row(plan: Plan, stage: StagePlan, y: float, scale: float) -> Element:
    row = _node("g", _node("text", f"stage {stage.pp}", x=_BARS[0] - 8, y=y + 16, class_="end"), class_="stage")
    x: float = _BARS[0]
    for kind, colour in zip(kinds_of(plan), _KIND_COLOURS, strict=False):
        width = kind.of(stage) * scale
        tooltip = _node("title", f"stage {stage.pp}: {kind.name} {gib(kind.of(stage))} GiB")
        row.append(
            _node("rect", tooltip, x=x, y=y, width=width, height=_ROW - _GAP, fill=colour, class_=f"kind {kind.name}")
        )
        x += width
    too_much = plan.gpu_memory is not None and stage.total_bytes > plan.gpu_memory
    row.append(_node("text", gib(stage.total_bytes), x=895, y=y + 16, class_="end over" if too_much else "end"))
    return row


def _memory_description(plan: Plan) -> str:
    least = min(stage.total_bytes for stage in plan.stages)
    limit = "" if plan.gpu_memory is None else f" A line marks the {gib(plan.gpu_memory)} GiB of a GPU."
    return (
        f"A bar for each of {len(plan.stages)} stages, stacked of {', '.join(kind.name for kind in kinds_of(plan))}: "
        f"from {gib(least)} to {gib(plan.worst.total_bytes)} GiB.{limit} The numbers are in the table of stages."
    )


def _ticks(longest: float) -> Iterator[float]:
    """Four to nine round numbers from zero on."""
    step: float = 10.0 ** ceil(log10(longest)) / 10
    step *= next(factor for factor in (0.2, 0.5, 1, 2) if longest / (step * factor) < 9)
    yield from (step * index for index in range(int(longest / step) + 1))


def _schedule_section(plan: Plan, timeline: Timeline) -> Element:
    chunks = max(len(stage.chunks) for stage in plan.stages)
    until = _drawn_until(timeline)
    drawn = [[one for one in rank if one.start < until] for rank in timeline.ranks]
    missing = sum(map(len, timeline.ranks)) - sum(map(len, drawn))
    if missing:
        scope = f"The first {until / timeline.length:.1%} of the step is shown; {missing:,} passes come after."
    else:
        scope = "The whole step is shown."
    numbers = "Numbers are microbatches"
    numbers += " and, below them, chunks of the rank; later chunks are paler." if chunks > 1 else "."
    legend = [
        ("forward", _tint(_FORWARD, 0, chunks)),
        ("backward", _tint(_BACKWARD, 0, chunks)),
        ("bubble", "url(#hatch)"),
    ]
    return _node(
        "section",
        _node("h2", "Schedule of a step"),
        _node("p", f"{numbers} Hatched: a rank waits, in a bubble of the pipeline. {scope}", id="schedule-scope"),
        _legend(legend),
        _node(
            "div",
            _stage_names(timeline),
            _schedule_picture(drawn, until, chunks, scope),
            class_="scroll pipeline",
            tabindex="0",
            role="region",
            aria_label="Schedule of a step, scrolls sideways",
        ),
        id="schedule",
    )


def _drawn_until(timeline: Timeline) -> float:
    starts = sorted(one.start for rank in timeline.ranks for one in rank)
    return timeline.length if len(starts) <= _MOST_PASSES else starts[_MOST_PASSES]


def _stage_names(timeline: Timeline) -> Element:
    names = [
        _node("text", f"stage {rank}, {bubble:.1%} idle", x=0, y=rank * _ROW + 15)
        for rank, bubble in enumerate(timeline.bubbles)
    ]
    return _node("svg", *names, width=130, height=len(names) * _ROW, class_="names", aria_hidden="true")


def _schedule_picture(ranks: Sequence[Sequence[TimedPass]], until: float, chunks: int, scope: str) -> Element:
    lengths = [one.end - one.start for rank in ranks for one in rank]
    scale = max(_MEAN_PASS * len(lengths) / sum(lengths), _NARROWEST / until) if until else 1.0
    width = until * scale
    stripes = _node(
        "pattern",
        _node("rect", width=6, height=6, class_="hatch-back"),
        _node("line", x1=0, x2=0, y1=0, y2=6, class_="hatch-line"),
        id="hatch",
        width=6,
        height=6,
        patternUnits="userSpaceOnUse",
        patternTransform="rotate(45)",
    )
    description = f"A row for each of {len(ranks)} pipeline ranks, time to the right. {scope}"
    parts = [
        _node("title", "Forward and backward passes of each pipeline rank", id="schedule-title"),
        _node("desc", f"{description} How long each rank idles is in the table of stages.", id="schedule-desc"),
        _node("defs", stripes),
    ]
    for rank, timed in enumerate(ranks):
        y, height = rank * _ROW, _ROW - _GAP
        parts.append(_node("rect", x=0, y=y, width=width, height=height, class_="bubble"))
        parts += [_pass(one, y, scale, min(one.end, until) * scale, chunks) for one in timed]
    picture = _picture("schedule", width, len(ranks) * _ROW, parts)
    picture.set("width", f"{width:.7g}")
    picture.set("height", str(len(ranks) * _ROW))
    return picture


def _pass(one: TimedPass, y: float, scale: float, end: float, chunks: int) -> Element:
    what, start = one.what, one.start * scale
    name, colour = ("forward", _FORWARD) if what.forward else ("backward", _BACKWARD)
    of_chunk = f", chunk {what.chunk}" if chunks > 1 else ""
    drawn = _node(
        "g",
        _node("title", f"{name}, microbatch {what.microbatch}{of_chunk}"),
        _node("rect", x=start, y=y, width=end - start, height=_ROW - _GAP, fill=_tint(colour, what.chunk, chunks)),
        class_=f"pass {name}",
    )
    if end - start > 7 * len(str(what.microbatch)):
        labels = [str(what.microbatch), str(what.chunk)] if chunks > 1 else [str(what.microbatch)]
        top = y + (10 if chunks > 1 else 15)
        middle = (start + end) / 2
        drawn.extend(_node("text", label, x=middle, y=top + 10 * line) for line, label in enumerate(labels))
    return drawn


def _tint(colour: tuple[int, int, int], chunk: int, chunks: int) -> str:
    """The later the chunk, the nearer to white; the text on it stays dark."""
    share = 0.7 * chunk / max(chunks - 1, 1)
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in colour)


def _picture(name: str, width: float, height: float, parts: Iterable[Element]) -> Element:
    return _node(
        "svg",
        *parts,
        viewBox=f"0 0 {width:.7g} {height:.7g}",
        role="img",
        aria_labelledby=f"{name}-title",
        aria_describedby=f"{name}-desc",
    )


def _legend(entries: Iterable[tuple[str, str]]) -> Element:
    items = [
        _node(
            "li",
            _node("svg", _node("rect", width=14, height=14, fill=fill), width=14, height=14, aria_hidden="true"),
            name,
        )
        for name, fill in entries
    ]
    return _node("ul", *items, class_="legend")


def _numbers_section(plan: Plan, timeline: Timeline) -> Element:
    return _node(
        "section",
        _node("h2", "Numbers"),
        _node("p", "Of one rank of each stage, in bytes and FLOPs a step; digits are grouped on the screen only."),
        *_table("stages", "Stages", _stage_rows(plan, timeline), is_open=True),
        *_table("chunks", "Chunks, for one microbatch", _chunk_rows(plan)),
        *_table("traffic", "Sent in a step", _traffic_rows(plan)),
        *_table("layout", "Layout", [{"axis": axis, "size": size} for axis, size in plan.layout.items()]),
        id="numbers",
    )


def _stage_rows(plan: Plan, timeline: Timeline) -> list[dict[str, str | int]]:
    return [
        {
            "stage": stage.pp,
            "rank": stage.rank,
            "parameters": stage.parameters,
            "weights": stage.weight_bytes,
            "gradients": stage.gradient_bytes,
            "master weights": stage.master_bytes,
            "optimizer state": stage.state_bytes,
            "activations": stage.activation_bytes,
            "unsharded": stage.unsharded_bytes,
            "total": stage.total_bytes,
            "buckets": len(stage.buckets),
            "FLOPs": stage.flops,
            "idle": f"{bubble:.1%}",
        }
        for stage, bubble in zip(plan.stages, timeline.bubbles, strict=True)
    ]


def _chunk_rows(plan: Plan) -> list[dict[str, str | int]]:
    return [
        {
            "stage": stage.pp,
            "chunk": chunk.vp_stage,
            "layers": layer_ranges(chunk.layers),
            "parameters": chunk.parameters,
            "activations": chunk.activation_bytes,
            "forward FLOPs": chunk.forward_flops,
            "FLOPs": chunk.flops,
        }
        for stage in plan.stages
        for chunk in stage.chunks
    ]


def _traffic_rows(plan: Plan) -> list[dict[str, str | int]]:
    return [
        {
            "stage": stage.pp,
            "group": traffic.group,
            "ranks": traffic.ranks,
            "operation": traffic.operation,
            "calls": traffic.calls,
            "bytes": traffic.bytes,
        }
        for stage in plan.stages
        for traffic in stage.traffic
    ]


def _table(
    name: str, caption: str, rows: Sequence[dict[str, str | int]], *, is_open: bool = False
) -> Iterator[Element]:
    """A table that can be folded away and copied; nothing without rows."""
    if not rows:
        return
    lines = [
        _node("tr", *(_cell(value, of_row=index == 0) for index, value in enumerate(row.values()))) for row in rows
    ]
    table = _node(
        "table",
        _node("thead", _node("tr", *(_node("th", column, scope="col") for column in rows[0]))),
        _node("tbody", *lines),
        id=f"table-{name}",
        aria_label=caption,
    )
    button = _node("button", "Copy", type="button", data_table=f"table-{name}", hidden="hidden")
    summary = _node("summary", f"{caption} ({len(rows):,})")
    details = _node("details", summary, button, _node("div", table, class_="scroll"))
    if is_open:
        details.set("open", "open")
    yield details


def _cell(value: str | int, *, of_row: bool) -> Element:
    if of_row:
        return _node("th", str(value), scope="row")
    if isinstance(value, str):
        return _node("td", value, class_="words")
    return _node("td", *(_node("span", group) for group in f"{value:,}".split(",")))
