"""The HTML page of a plan."""

import html
import re
from dataclasses import replace

import pytest
from example_plans import DEEP, GIB, KINDS, LARGE, SMALL, make_plan, make_stage, render_on_terminal, sizes, words
from parsed_page import Element, StrictParser, parse_page, rows

from bridge.dist.plan.results import NOT_COVERED, Plan, Traffic
from bridge.dist.plan.show.page import render_page


@pytest.mark.parametrize(
    ("plan", "verdict"),
    [
        (SMALL, "stage 0 (first rank 0) needs the most: 76.000 of 80.000 GiB: fits, 4.000 GiB are left"),
        (LARGE, "90.000 of 80.000 GiB: does not fit, 10.000 GiB too much; 1 of 16 stage(s) do not fit"),
        (replace(SMALL, gpu_memory=None), "stage 0 (first rank 0) needs the most: 76.000 GiB"),
    ],
    ids=["fits", "does not fit", "no limit"],
)
def test_terminal_and_page_say_whether_the_plan_fits(plan: Plan, verdict: str) -> None:
    assert verdict in words(render_on_terminal(plan))
    assert verdict in html.unescape(render_page(plan, "a model"))


def test_unsharded_memory_is_shown_as_a_separate_kind() -> None:
    stages = [replace(s, unsharded_bytes=8 * GIB, total_bytes=s.total_bytes + 8 * GIB) for s in SMALL.stages]
    plan = replace(SMALL, stages=stages)
    shown = render_on_terminal(plan)
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"A+[|]?U+[| ]*$", shown, re.MULTILINE)
    assert "the total is an upper bound" in words(shown)
    assert "unsharded" not in render_on_terminal(SMALL)
    picture = parse_page(plan).one("section", id="memory").one("svg", role="img")
    drawn = picture.all("rect", class_="unsharded")
    assert [rect.one("title").text for rect in drawn] == [f"stage {pp}: unsharded 8.000 GiB" for pp in (0, 1)]


@pytest.mark.parametrize("plan", [SMALL, LARGE], ids=["small", "large"])
def test_the_page_draws_memory_by_kind_to_scale(plan: Plan) -> None:
    picture = parse_page(plan).one("section", id="memory").one("svg", role="img")
    stages = picture.all("g", class_="stage")
    assert [stage.all("text")[0].text for stage in stages] == [f"stage {pp}" for pp in range(len(plan.stages))]
    limit = float(picture.one("line", class_="limit").attributes["x1"])
    start = float(stages[0].all("rect")[0].attributes["x"])
    for drawn, stage in zip(stages, plan.stages, strict=True):
        at = start
        for kind, size in zip(KINDS, sizes(stage), strict=True):
            rect = drawn.one("rect", class_=kind)
            assert float(rect.attributes["x"]) == pytest.approx(at, abs=0.01)
            assert float(rect.attributes["width"]) == pytest.approx(size / (80 * GIB) * (limit - start), abs=0.01)
            assert rect.one("title").text == f"stage {stage.pp}: {kind} {size / GIB:.3f} GiB"
            at += float(rect.attributes["width"])
        assert ("over" in drawn.all("text")[1].attributes["class"]) == (stage.total_bytes > 80 * GIB) == (at > limit)


def test_the_page_draws_the_schedule() -> None:
    """The 1F1B schedule on two ranks, with a backward pass that takes twice as long as the forward pass."""
    section = parse_page(SMALL).one("section", id="schedule")
    picture = section.one("svg", role="img")
    passes = picture.all("g", class_="pass")
    order = ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "F4", "B3", "F5", "B4", "F6", "B5", "F7", "B6", "B7"]
    assert [_pass_name(one) for one in passes[:16]] == order
    rows = [passes[:16], passes[16:]]
    width = float(picture.attributes["width"])
    unit = width / (3 * 9)  # eight microbatches and one bubble, each 3 units
    assert [float(row[0].one("rect").attributes["x"]) for row in rows] == pytest.approx([0, unit], abs=0.01)
    for row in rows:
        for one in row:
            taken = unit if "forward" in one.attributes["class"] else 2 * unit
            assert float(one.one("rect").attributes["width"]) == pytest.approx(taken, abs=0.01)
    assert len({one.one("rect").attributes["fill"] for one in passes}) == 2
    assert len(picture.all("rect", class_="bubble")) == 2
    assert "The whole step is shown." in section.text
    assert section.text.count("11.1% idle") == 2


def _pass_name(drawn: Element) -> str:
    (label,) = drawn.all("text")
    return ("F" if "forward" in drawn.attributes["class"] else "B") + label.text


def test_a_long_schedule_is_truncated_with_a_note() -> None:
    text = render_page(DEEP, "a model")
    assert len(text) < 1_000_000
    section = StrictParser(text).root.one("section", id="schedule")
    passes = section.all("g", class_="pass")
    scope = section.one("p", id="schedule-scope").text
    missing = re.search(r"The first [\d.]+% of the step is shown; ([\d,]+) later passes are not.", scope)
    assert missing is not None
    assert int(missing[1].replace(",", "")) == 16 * 64 * 2 * 2 - len(passes)
    # The shown part includes backward passes of all ranks, so it covers more than the warm-up.
    first = {float(one.one("rect").attributes["y"]) for one in passes if "backward" in one.attributes["class"]}
    assert len(first) == 16
    assert {one.text for one in passes[0].all("text")} == {"0"}
    assert passes[0].one("title").text == "forward, microbatch 0, chunk 0"
    picture = section.one("svg", role="img")
    assert (
        max(float(one.one("rect").attributes["x"]) + float(one.one("rect").attributes["width"]) for one in passes)
        <= float(picture.attributes["width"]) + 0.01
    )


def test_the_page_contains_every_number_exactly() -> None:
    found = parse_page(DEEP)
    stages = rows(found.one("table", id="table-stages"))
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
    chunks = rows(found.one("table", id="table-chunks"))
    assert [(row["stage"], row["chunk"], row["layers"]) for row in chunks[:3]] == [
        ("0", "0", "0"),
        ("0", "1", "4"),
        ("1", "0", "1"),
    ]
    assert len(rows(found.one("table", id="table-traffic"))) == 16
    assert {row["axis"]: row["size"] for row in rows(found.one("table", id="table-layout"))}["pp"] == "16"
    said = found.one("dl").text
    assert all(what in said for what in NOT_COVERED)


def test_the_page_is_self_contained_and_accessible() -> None:
    text = render_page(LARGE, "a model")
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\((?!#)", text)
    found = StrictParser(text).root
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
    assert all("hidden" in button.attributes for button in found.all("button"))  # they need the script


def test_the_page_escapes_its_input() -> None:
    name = "</title><script>alert(1)</script>&amp;\"'"
    traffic = [Traffic(group=name, ranks=2, operation=name, calls=1, bytes=1)]
    found = parse_page(replace(SMALL, stages=[replace(SMALL.stages[0], traffic=traffic), SMALL.stages[1]]), name)
    assert len(found.all("script")) == 1
    assert found.one("h1").text == found.one("head").one("title").text == f"Plan of {name}"
    assert rows(found.one("table", id="table-traffic"))[0]["group"] == name


def test_a_plan_without_pipeline_or_limit_has_a_page() -> None:
    plan = make_plan([make_stage(0, (10, 20, 10, 10))], gpu_memory=None)
    found = parse_page(replace(plan, stages=[replace(plan.stages[0], traffic=[])]))
    assert not found.all("line", class_="limit")
    assert not found.all("table", id="table-traffic")
    assert len(found.one("section", id="schedule").all("g", class_="pass")) == 16
    assert "bubbles" not in found.one("dl").text
