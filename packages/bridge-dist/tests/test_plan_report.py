"""A plan for people: its tables on the terminal, and its page, parsed and opened in a browser."""

import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bridge.dist.plan.results import NOT_COVERED, ChunkPlan, Plan, StagePlan, Traffic
from bridge.dist.plan.show.page import page
from bridge.dist.plan.show.terminal import tables

GIB = 2**30
KINDS = ("weights", "gradients", "optimizer", "activations")


def _stage(
    pp: int, gib: tuple[int, int, int, int], *, chunks: int = 1, flops: int = 3 * 10**12, traffic: int = GIB
) -> StagePlan:
    """A stage of so many GiB of weights, gradients, the optimizer (a third of it master weights) and activations."""
    weights, gradients, optimizer, activations = (size * GIB for size in gib)
    return StagePlan(
        pp=pp,
        rank=8 * pp,
        parameters=1_234_567_890,
        weight_bytes=weights + 1,  # so that exact bytes are no round ones
        gradient_bytes=gradients,
        master_bytes=optimizer // 3,
        state_bytes=optimizer - optimizer // 3,
        optimizer_bytes=optimizer,
        activation_bytes=activations,
        unsharded_bytes=0,
        total_bytes=weights + 1 + gradients + optimizer + activations,
        flops=8 * chunks * flops,
        buckets=[40_000_000, 12_345_678],
        chunks=[
            ChunkPlan(
                vp_stage=chunk,
                layers=[4 * chunk + pp],
                parameters=1_234_567_890 // chunks,
                activation_bytes=GIB,
                forward_flops=flops // 3,
                flops=flops,
            )
            for chunk in range(chunks)
        ],
        traffic=[Traffic(group="tp", ranks=8, operation="allgather", calls=12, bytes=traffic)],
    )


def _plan(stages: list[StagePlan], *, gpu_memory: int | None = 80 * GIB, **changes: Any) -> Plan:
    vp = len(stages[0].chunks)
    plan = Plan(
        world_size=8 * len(stages),
        layout={"tp": 8, "pp": len(stages), "vp": vp, "cp": 1, "ep": 1, "etp": 8, "dp": 1},
        wrap="ddp",
        distributed_optimizer=True,
        layers="pytorch",
        seq_length=8192,
        micro_batch_size=1,
        global_batch_size=8,
        microbatches=8,
        microbatch_group_size=None,
        parameters=98_765_432_100,
        buffers=14_848,
        gpu_memory=gpu_memory,
        stages=stages,
        seconds=2.5,
    )
    return replace(plan, **changes)


SMALL = _plan([_stage(0, (10, 20, 10, 36), traffic=2 * GIB), _stage(1, (10, 20, 10, 20), traffic=3 * GIB)])
LARGE = _plan(
    [_stage(0, (10, 20, 12, 48)), *(_stage(pp, (10, 20, 12, 18)) for pp in range(1, 15)), _stage(15, (10, 20, 12, 28))]
)
DEEP = _plan([_stage(pp, (10, 20, 10, 30 - pp), chunks=2) for pp in range(16)], microbatches=64, global_batch_size=64)


def _shown(plan: Plan, *, width: int = 80, colour: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="standard" if colour else None
    )
    for part in tables(plan):
        console.print(part)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def _words(shown: str) -> str:
    return " ".join(shown.split())


@pytest.mark.parametrize("plan", [SMALL, LARGE, DEEP], ids=["small", "large", "deep"])
def test_the_terminal_shows_it_in_80_columns_without_colour(plan: Plan) -> None:
    shown = _shown(plan)
    assert shown.isascii()
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    for statement in (*NOT_COVERED, "98,765,432,100, and 14,848 in buffers", "8,192 tokens", "planned in 2.5 s"):
        assert statement in _words(shown)


def test_colour_adds_nothing_to_the_text() -> None:
    coloured = _shown(SMALL, colour=True)
    assert "\x1b" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == _shown(SMALL)


def test_worst_stages_come_first_and_equal_ones_are_one_row() -> None:
    rows = [line.split() for line in _shown(LARGE).splitlines() if "1,234,567,890" in line]
    assert [(row[0], row[1], row[3]) for row in rows] == [
        ("0", "1", "90.000!"),  # more than a GPU has
        ("15", "1", "70.000"),
        ("1-14", "1", "60.000"),
    ]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("plan", "folded"), [(SMALL, [0, 1]), (LARGE, [0, 15, 1])], ids=["fits", "does not fit"])
def test_bars_are_as_long_as_memory_is_large(plan: Plan, folded: list[int], width: int) -> None:
    bars = re.findall(r"(W+G+O+A[A |]*)$", _shown(plan, width=width), re.MULTILINE)
    (limit,) = {bar.index("|") for bar in bars}
    assert limit > 0.2 * width
    for bar, pp in zip(bars, folded, strict=True):
        for letter, size in zip("WGOA", _sizes(plan.stages[pp]), strict=True):
            assert bar.count(letter) == pytest.approx(size / (80 * GIB) * limit, abs=1)
        assert (bar.index("|") < bar.rindex("A")) == (plan.stages[pp].total_bytes > 80 * GIB)


def test_without_a_limit_the_longest_bar_is_that_of_the_worst_stage() -> None:
    first, second = re.findall(r"(W+G+O+A+) *$", _shown(replace(SMALL, gpu_memory=None)), re.MULTILINE)
    assert len(second) / len(first) == pytest.approx(60 / 76, abs=0.03)


def _sizes(stage: StagePlan) -> tuple[int, int, int, int]:
    return stage.weight_bytes, stage.gradient_bytes, stage.optimizer_bytes, stage.activation_bytes


@pytest.mark.parametrize(
    ("plan", "verdict"),
    [
        (SMALL, "stage 0 (rank 0 and those beside it) holds most: 76.000 of 80.000 GiB: fits, 4.000 GiB are left"),
        (LARGE, "90.000 of 80.000 GiB: does not fit, 10.000 GiB too much; in all 1 of 16 stage(s) do not fit"),
        (replace(SMALL, gpu_memory=None), "stage 0 (rank 0 and those beside it) holds most: 76.000 GiB"),
    ],
    ids=["fits", "does not fit", "no limit"],
)
def test_the_verdict_is_on_the_terminal_and_on_the_page(plan: Plan, verdict: str) -> None:
    assert verdict in _words(_shown(plan))
    assert verdict in html.unescape(page(plan, "a model"))


def test_what_a_wrapper_makes_whole_is_a_kind_of_its_own() -> None:
    stages = [replace(s, unsharded_bytes=8 * GIB, total_bytes=s.total_bytes + 8 * GIB) for s in SMALL.stages]
    plan = replace(SMALL, stages=stages)
    shown = _shown(plan)
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"A+[|]?U+[| ]*$", shown, re.MULTILINE)
    assert "added to that of the activations" in _words(shown)
    assert "unsharded" not in _shown(SMALL)
    picture = _parsed(plan).one("section", id="memory").one("svg", role="img")
    drawn = picture.all("rect", class_="unsharded")
    assert [rect.one("title").text for rect in drawn] == [f"stage {pp}: unsharded 8.000 GiB" for pp in (0, 1)]


def test_traffic_is_that_of_the_stage_that_sends_most() -> None:
    assert "tp 8 allgather 12 3.000 1" in _words(_shown(SMALL))


def test_what_looks_like_markup_is_shown_as_it_is() -> None:
    traffic = [Traffic(group="[red]", ranks=2, operation="[/]", calls=1, bytes=1)]
    plan = replace(SMALL, wrap="[bold]x", stages=[replace(stage, traffic=traffic) for stage in SMALL.stages])
    shown = _words(_shown(plan))
    assert "[red] 2 [/] 1" in shown
    assert "wrapped with [bold]x" in shown


# The page, parsed.


@dataclass
class _Element:
    tag: str
    attributes: dict[str, str]
    children: list["_Element | str"] = field(default_factory=list)

    def all(self, tag: str, **attributes: str) -> list["_Element"]:
        """Elements of a tag below this one, with these attributes, of which a class may be one among others."""
        found = []
        for child in self.children:
            if isinstance(child, _Element):
                has = child.attributes
                wanted = {name.rstrip("_"): value for name, value in attributes.items()}
                if child.tag == tag and all(
                    value in (has.get(key, ""), *has.get(key, "").split()) for key, value in wanted.items()
                ):
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    def one(self, tag: str, **attributes: str) -> "_Element":
        (found,) = self.all(tag, **attributes)
        return found

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class _Strict(HTMLParser):
    """Makes elements of a page in which every element that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = _Element("", {})
        self._open = [self.root]
        self.feed(text)
        self.close()
        assert self._open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        element = _Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(element)
        if tag != "meta":
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def _parsed(plan: Plan, title: str = "a model") -> _Element:
    return _Strict(page(plan, title)).root


@pytest.mark.parametrize("plan", [SMALL, LARGE], ids=["small", "large"])
def test_the_page_draws_memory_stacked_by_kind_to_scale(plan: Plan) -> None:
    picture = _parsed(plan).one("section", id="memory").one("svg", role="img")
    stages = picture.all("g", class_="stage")
    assert [stage.all("text")[0].text for stage in stages] == [f"stage {pp}" for pp in range(len(plan.stages))]
    limit = float(picture.one("line", class_="limit").attributes["x1"])
    start = float(stages[0].all("rect")[0].attributes["x"])
    for drawn, stage in zip(stages, plan.stages, strict=True):
        at = start
        for kind, size in zip(KINDS, _sizes(stage), strict=True):
            rect = drawn.one("rect", class_=kind)
            assert float(rect.attributes["x"]) == pytest.approx(at, abs=0.01)
            assert float(rect.attributes["width"]) == pytest.approx(size / (80 * GIB) * (limit - start), abs=0.01)
            assert rect.one("title").text == f"stage {stage.pp}: {kind} {size / GIB:.3f} GiB"
            at += float(rect.attributes["width"])
        assert ("over" in drawn.all("text")[1].attributes["class"]) == (stage.total_bytes > 80 * GIB) == (at > limit)


def test_the_page_draws_the_schedule() -> None:
    """One-forward-one-backward on two ranks, the backward pass twice as long: what the textbook has."""
    section = _parsed(SMALL).one("section", id="schedule")
    picture = section.one("svg", role="img")
    passes = picture.all("g", class_="pass")
    order = ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "F4", "B3", "F5", "B4", "F6", "B5", "F7", "B6", "B7"]
    assert [_short(one) for one in passes[:16]] == order
    rows = [passes[:16], passes[16:]]
    width = float(picture.attributes["width"])
    unit = width / (3 * 9)  # of eight microbatches on two ranks
    assert [float(row[0].one("rect").attributes["x"]) for row in rows] == pytest.approx([0, unit], abs=0.01)
    for row in rows:
        for one in row:
            taken = unit if "forward" in one.attributes["class"] else 2 * unit
            assert float(one.one("rect").attributes["width"]) == pytest.approx(taken, abs=0.01)
    assert len({one.one("rect").attributes["fill"] for one in passes}) == 2
    assert len(picture.all("rect", class_="bubble")) == 2
    assert "The whole step is shown." in section.text
    assert section.text.count("11.1% idle") == 2


def _short(drawn: _Element) -> str:
    (label,) = drawn.all("text")
    return ("F" if "forward" in drawn.attributes["class"] else "B") + label.text


def test_of_a_long_schedule_the_beginning_is_drawn_and_the_page_says_so() -> None:
    text = page(DEEP, "a model")
    assert len(text) < 1_000_000
    section = _Strict(text).root.one("section", id="schedule")
    passes = section.all("g", class_="pass")
    scope = section.one("p", id="schedule-scope").text
    missing = re.search(r"The first [\d.]+% of the step is shown; ([\d,]+) passes come after.", scope)
    assert missing is not None
    assert int(missing[1].replace(",", "")) == 16 * 64 * 2 * 2 - len(passes)
    # All ranks run backward passes: the warm-up is over.
    first = {float(one.one("rect").attributes["y"]) for one in passes if "backward" in one.attributes["class"]}
    assert len(first) == 16
    assert {one.text for one in passes[0].all("text")} == {"0"}
    assert passes[0].one("title").text == "forward, microbatch 0, chunk 0"
    picture = section.one("svg", role="img")
    assert (
        max(float(one.one("rect").attributes["x"]) + float(one.one("rect").attributes["width"]) for one in passes)
        <= float(picture.attributes["width"]) + 0.01
    )


def test_the_page_has_every_number_exactly() -> None:
    found = _parsed(DEEP)
    stages = _rows(found.one("table", id="table-stages"))
    assert len(stages) == 16
    for row, stage in zip(stages, DEEP.stages, strict=True):
        numbers = (row["weights"], row["gradients"], row["activations"], row["total"], row["FLOPs"], row["rank"])
        assert tuple(map(int, numbers)) == (
            stage.weight_bytes,
            stage.gradient_bytes,
            stage.activation_bytes,
            stage.total_bytes,
            stage.flops,
            stage.rank,
        )
        assert int(row["master weights"]) + int(row["optimizer state"]) == stage.optimizer_bytes
    chunks = _rows(found.one("table", id="table-chunks"))
    assert [(row["stage"], row["chunk"], row["layers"]) for row in chunks[:3]] == [
        ("0", "0", "0"),
        ("0", "1", "4"),
        ("1", "0", "1"),
    ]
    assert len(_rows(found.one("table", id="table-traffic"))) == 16
    assert {row["axis"]: row["size"] for row in _rows(found.one("table", id="table-layout"))}["pp"] == "16"
    said = found.one("dl").text
    assert all(what in said for what in NOT_COVERED)


def _rows(table: _Element) -> list[dict[str, str]]:
    names = [cell.text for cell in table.one("thead").all("th", scope="col")]
    rows = [[cell.text for cell in row.children if isinstance(cell, _Element)] for row in table.one("tbody").all("tr")]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_the_page_needs_nothing_from_elsewhere_and_can_be_read_aloud() -> None:
    text = page(LARGE, "a model")
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\((?!#)", text)
    found = _Strict(text).root
    assert found.one("html").attributes["lang"] == "en"
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for picture in found.all("svg"):
        if picture.attributes.get("aria-hidden") != "true":
            title = picture.one("title", id=picture.attributes["aria-labelledby"])
            description = picture.one("desc", id=picture.attributes["aria-describedby"])
            assert title.text
            assert description.text
    assert all(table.attributes["aria-label"] for table in found.all("table"))
    assert all("hidden" in button.attributes for button in found.all("button"))  # without a script they do nothing


def test_the_page_escapes_what_it_is_given() -> None:
    name = "</title><script>alert(1)</script>&amp;\"'"
    traffic = [Traffic(group=name, ranks=2, operation=name, calls=1, bytes=1)]
    found = _parsed(replace(SMALL, stages=[replace(SMALL.stages[0], traffic=traffic), SMALL.stages[1]]), name)
    assert len(found.all("script")) == 1
    assert found.one("h1").text == found.one("head").one("title").text == f"Plan of {name}"
    assert _rows(found.one("table", id="table-traffic"))[0]["group"] == name


def test_a_job_without_pipeline_and_limit_has_its_page_too() -> None:
    plan = _plan([_stage(0, (10, 20, 10, 10))], gpu_memory=None)
    found = _parsed(replace(plan, stages=[replace(plan.stages[0], traffic=[])]))
    assert not found.all("line", class_="limit")
    assert not found.all("table", id="table-traffic")
    assert len(found.one("section", id="schedule").all("g", class_="pass")) == 16
    assert "bubbles" not in found.one("dl").text


# The page, opened.

_BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chromium-browser", "chrome")
_BROWSER = next((path for path in map(shutil.which, _BROWSERS) if path), None)

_WATCH = """<script>
const problems = [];
addEventListener("error", event => problems.push(event.message));
addEventListener("securitypolicyviolation", event => problems.push(event.violatedDirective));
</script>"""
_PROBE = """<script>
const box = element => { const { left, right, width, height } = element.getBoundingClientRect();
  return { left, right, width, height }; };
document.querySelector("button[data-table=table-stages]").click();
const found = {
  title: document.title,
  page: getComputedStyle(document.body).backgroundColor,
  text: getComputedStyle(document.querySelector("svg text")).fill,
  stages: [...document.querySelectorAll("#memory g.stage")].map(g => [...g.querySelectorAll("rect")].map(box)),
  limit: box(document.querySelector("#memory line.limit")),
  passes: [...document.querySelectorAll("#schedule g.pass rect")].map(box),
  bubble: getComputedStyle(document.querySelector("#schedule rect.bubble")).fill,
  copied: getSelection().toString(),
  buttons: [...document.querySelectorAll("button")].map(button => button.hidden),
  overflows: document.documentElement.scrollWidth > document.documentElement.clientWidth,
  resources: performance.getEntriesByType("resource").length,
};
const probe = document.createElement("pre");
probe.id = "probe";
document.body.append(probe);
// Before the browser writes the page out, which it does once it is loaded; a frame may never be drawn.
addEventListener("load", () => { probe.textContent = JSON.stringify({ ...found, problems }); });
</script>"""


def _opened(plan: Plan, folder: Path, *, dark: bool) -> dict[str, Any]:
    """What a browser makes of the page of a plan."""
    assert _BROWSER is not None
    file = folder / "plan.html"
    text = page(plan, "a <b> model")
    file.write_text(text.replace("<head>", f"<head>{_WATCH}").replace("</body>", f"{_PROBE}</body>"), encoding="utf-8")
    command = [_BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1400", "--dump-dom"]
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=1000", scheme, file.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    probe = re.search(r'<pre id="probe">(.*?)</pre>', dumped, re.DOTALL)
    assert probe is not None, dumped[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(probe[1]))
    return found


@pytest.mark.skipif(_BROWSER is None, reason=f"no browser of {', '.join(_BROWSERS)} is installed")
def test_a_browser_shows_the_pictures_in_light_and_dark(tmp_path: Path) -> None:
    light, dark = (_opened(LARGE, tmp_path, dark=scheme) for scheme in (False, True))
    assert light["page"] == "rgb(255, 255, 255)"
    assert sum(map(int, re.findall(r"\d+", dark["page"]))) < 150
    assert sum(map(int, re.findall(r"\d+", dark["text"]))) > 600

    assert light["title"] == "Plan of a <b> model"
    assert light["problems"] == []
    assert light["resources"] == 0
    assert not light["overflows"]
    assert not any(light["buttons"])

    start = light["stages"][0][0]["left"]
    per_gib = (light["limit"]["left"] + light["limit"]["width"] / 2 - start) / 80
    assert len(light["stages"]) == 16
    for drawn, stage in zip(light["stages"], LARGE.stages, strict=True):
        assert [one["width"] / per_gib for one in drawn] == pytest.approx(
            [size / GIB for size in _sizes(stage)], abs=0.2
        )
        assert drawn[-1]["right"] == pytest.approx(start + stage.total_bytes / GIB * per_gib, abs=1)
    assert len(light["passes"]) == 16 * 8 * 2
    assert min(one["width"] for one in light["passes"]) > 10
    assert "#hatch" in light["bubble"]

    copied = [line.split("\t") for line in light["copied"].strip().splitlines()]
    worst = LARGE.stages[0]
    first = dict(zip(copied[0], copied[1], strict=True))
    assert first["total"].strip() == str(worst.total_bytes)
    assert len(copied) == 17
