"""The HTML page of a plan."""

import html
import re
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from example_plans import DEEP, GIB, KINDS, LARGE, SMALL, make_plan, make_stage, render_on_terminal, sizes, words
from parsed_page import StrictParser, parse_page, read_columns, read_data, rows

from bridge.dist.formatting import format_seconds
from bridge.dist.plan.forecast.advice import Advice
from bridge.dist.plan.forecast.machine import list_machines, load_machine
from bridge.dist.plan.forecast.step_time import compute_training_cost, estimate_time, make_timeline
from bridge.dist.plan.results import NOT_COVERED, MatrixProduct, Origin, PassCost, Plan, Traffic
from bridge.dist.plan.show.page import render_page
from bridge.dist.plan.show.words import list_idle_shares
from bridge.dist.run.commands import options
from bridge.dist.run.commands.plan import plan as plan_command

MAX_BYTES = 2_000_000


@pytest.mark.parametrize(
    ("plan", "verdict", "state", "banner"),
    [
        (
            SMALL,
            "stage 0 (first rank 0) needs the most: 76.000 of 80.000 GiB: fits, 4.000 GiB are left",
            "fits",
            "Fits. 4.000 GiB are left: stage 0 needs the most, 76.000 of 80.000 GiB",
        ),
        (
            LARGE,
            "90.000 of 80.000 GiB: does not fit, 10.000 GiB too much; 1 of 16 stage(s) do not fit",
            "too-large",
            "Does not fit. 10.000 GiB too much: stage 0 needs the most, 90.000 of 80.000 GiB; "
            "1 of 16 stages do not fit",
        ),
        (
            replace(SMALL, gpu_memory=None),
            "stage 0 (first rank 0) needs the most: 76.000 GiB",
            "unknown",
            "Not checked. stage 0 needs the most, 76.000 GiB; --gpu-memory or --machine says what a GPU has",
        ),
    ],
    ids=["fits", "does not fit", "no limit"],
)
def test_terminal_and_page_say_whether_the_plan_fits(plan: Plan, verdict: str, state: str, banner: str) -> None:
    assert verdict in words(render_on_terminal(plan))
    assert verdict in html.unescape(render_page(plan, "a model"))
    shown = parse_page(plan).one("section", id="verdict")
    assert state in shown.attributes["class"].split()
    assert words(shown.text) == banner


def test_unsharded_memory_is_shown_as_a_separate_kind() -> None:
    stages = [replace(s, unsharded_bytes=8 * GIB, total_bytes=s.total_bytes + 8 * GIB) for s in SMALL.stages]
    plan = replace(SMALL, stages=stages)
    shown = render_on_terminal(plan)
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"A+[|]?U+[| ]*$", shown, re.MULTILINE)
    assert "the total is an upper bound" in words(shown)
    assert "unsharded" not in render_on_terminal(SMALL)
    assert read_columns(parse_page(plan), "memory", "memory")["unsharded"] == [8, 8]
    assert "unsharded" not in read_columns(parse_page(SMALL), "memory", "memory")
    assert [row["unsharded"] for row in rows(parse_page(plan).one("table", id="table-stages"))] == [str(8 * GIB)] * 2
    assert "unsharded" not in rows(parse_page(SMALL).one("table", id="table-stages"))[0]


@pytest.mark.parametrize("plan", [SMALL, LARGE], ids=["small", "large"])
def test_the_page_draws_memory_by_kind(plan: Plan) -> None:
    page = parse_page(plan)
    drawn = read_columns(page, "memory", "memory")
    assert drawn["stage"] == [str(stage.pp) for stage in plan.stages]
    for index, stage in enumerate(plan.stages):
        assert [drawn[kind][index] * GIB for kind in KINDS] == pytest.approx(sizes(stage))
        assert drawn["label"][index] == f"{stage.total_bytes / GIB:,.3f}"
    assert "memory of a GPU, 80.000 GiB" in page.one("figure", id="memory").text


def test_the_page_draws_the_schedule() -> None:
    """The 1F1B schedule on two ranks, with a backward pass that takes twice as long as the forward pass."""
    page = parse_page(SMALL)
    forward, backward = (read_columns(page, "schedule", name) for name in ("forward", "backward"))
    unit = 100 / (3 * 9)  # eight microbatches and one bubble, each 3 units
    starts = {
        (name, rank, microbatch): left / unit
        for name, passes in (("F", forward), ("B", backward))
        for rank, microbatch, left in zip(passes["rank"], passes["microbatch"], passes["left"], strict=True)
    }
    order = sorted((start, name, microbatch) for (name, rank, microbatch), start in starts.items() if rank == 0)
    names = "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7"
    assert " ".join(f"{name}{microbatch}" for _, name, microbatch in order) == names
    assert [starts["F", rank, 0] for rank in (0, 1)] == pytest.approx([0, 1], abs=1e-5)
    for passes, length in ((forward, 1), (backward, 2)):
        taken = [(right - left) / unit for left, right in zip(passes["left"], passes["right"], strict=True)]
        assert taken == pytest.approx([length] * 16, abs=1e-5)
    # Gradients of weights take half of a backward pass.
    assert backward["split"] == pytest.approx(np.add(backward["left"], backward["right"]) / 2, abs=1e-4)
    assert "11.1%" in rows(page.one("table", id="table-stages"))[0]["idle"]


def test_a_whole_step_of_16_ranks_with_8_chunks_and_64_microbatches_is_drawn() -> None:
    stages = [make_stage(pp, (10, 20, 10, 30), chunks=8) for pp in range(16)]
    text = render_page(make_plan(stages, microbatches=64), "a model")
    assert len(text.encode()) < MAX_BYTES
    page = StrictParser(text).root
    drawn = [read_columns(page, "schedule", name) for name in ("forward", "backward")]
    assert [len(passes["left"]) for passes in drawn] == [16 * 8 * 64] * 2
    assert max(drawn[1]["right"]) == pytest.approx(100)
    assert "later passes are not" not in text


def test_a_longer_schedule_is_truncated_with_a_note() -> None:
    text = render_page(replace(DEEP, microbatches=400), "a model")
    assert len(text.encode()) < MAX_BYTES
    page = StrictParser(text).root
    drawn = [read_columns(page, "schedule", name) for name in ("forward", "backward")]
    said = page.one("figure", id="schedule").one("div", role="img").attributes["aria-label"]
    missing = re.search(r"The first ([\d.]+)% of the step are drawn; ([\d,]+) later passes are not.", said)
    assert missing is not None
    assert int(missing[2].replace(",", "")) == 16 * 400 * 2 * 2 - sum(len(passes["left"]) for passes in drawn)
    assert max(max(passes["right"]) for passes in drawn) == pytest.approx(float(missing[1]), abs=0.06)
    assert set(drawn[1]["rank"]) == set(range(16))


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
    said = found.one("section", id="job").text
    assert all(what in said for what in NOT_COVERED)


def test_the_page_is_self_contained_and_accessible() -> None:
    machine = load_machine("h100")
    plan = replace(LARGE, time=estimate_time(LARGE, machine))
    page = StrictParser(render_page(plan, "a model", machine=machine)).root
    assert page.one("html").attributes["lang"] == "en"
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy.attributes["content"].startswith("default-src 'none'; ")
    assert not re.search(r"@import|url\(", page.one("style").text)
    everything = page.all_elements()
    assert not any({"src", "href"} & set(one.attributes) for one in everything)
    ids = [one.attributes["id"] for one in everything if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    charts = [one for one in everything if "data-chart" in one.attributes]
    assert [one.attributes["data-chart"] for one in charts] == ["memory", "time", "schedule", "traffic"]
    assert all(one.attributes["role"] == "img" and one.attributes["aria-label"] for one in charts)
    assert all(table.attributes["aria-label"] for table in page.all("table"))
    # What needs the script is hidden without it.
    copies = [one for one in page.all("button") if "data-copy" in one.attributes]
    assert all("hidden" in one.attributes for one in (*copies, page.one("form"), page.one("p", id="jumps")))


def test_the_page_escapes_its_input() -> None:
    name = "</title><script>alert(1)</script>&amp;\"'"
    traffic = [Traffic(group=name, ranks=2, operation=name, calls=1, bytes=1)]
    plan = replace(LARGE, stages=[replace(LARGE.stages[0], traffic=traffic), *LARGE.stages[1:]])
    text = render_page(
        plan,
        name,
        origin=Origin(command=name, overrides=[name], versions={name: name}),
        advice=[Advice(name, 70 * GIB, 1.5)],
    )
    page = StrictParser(text).root
    assert len(page.all("script")) == 3
    assert page.one("h1").text == page.one("head").one("title").text == f"Plan of {name}"
    assert rows(page.one("table", id="table-traffic"))[0]["group"] == name
    assert page.one("pre", id="command").text == name
    assert page.one("section", id="origin").one("code").text == name
    assert page.one("section", id="remedies").one("code").text == name
    assert f"{name}: {name}" in read_columns(page, "traffic", "traffic")["name"]


def test_a_plan_without_pipeline_or_limit_has_a_page() -> None:
    plan = make_plan([make_stage(0, (10, 20, 10, 10))], gpu_memory=None)
    page = parse_page(replace(plan, stages=[replace(plan.stages[0], traffic=[])]))
    assert "memory of a GPU" not in page.one("figure", id="memory").text
    assert list(read_data(page)["charts"]) == ["memory", "schedule"]
    assert not page.all("table", id="table-traffic")
    assert not page.all("section", id="remedies")
    assert len(read_columns(page, "schedule", "forward")["left"]) == 8
    assert "bubbles" not in page.one("section", id="job").text


def test_remedies_are_shown_with_their_numbers() -> None:
    advice = [Advice("--first", 70 * GIB, 1.5), Advice("--second", 85 * GIB, 0.002)]
    page = StrictParser(render_page(LARGE, "a model", advice=advice)).root
    assert rows(page.one("section", id="remedies").one("table")) == [
        {"change": "--first", "GiB": "70.000", "less, GiB": "20.000", "step": "1.500 s", "fits": "yes"},
        {"change": "--second", "GiB": "85.000", "less, GiB": "5.000", "step": "2.000 ms", "fits": "no"},
    ]


def test_the_page_has_a_cell_for_each_machine_and_number_of_microbatches() -> None:
    h100, b200 = load_machine("h100"), load_machine("b200")
    time = estimate_time(LARGE, h100)
    time = replace(time, training=compute_training_cost(LARGE, time, tokens=10**12, price=2.0))
    page = StrictParser(render_page(replace(LARGE, time=time), "a model", machine=h100)).root
    machines = [one.text for one in page.one("select").all("option")]
    assert machines[0] == "h100"
    assert sorted(machines) == sorted(list_machines())
    grid = read_data(page)["grid"]
    assert grid["counts"] == [8, 16, 32, 64, 128]
    assert page.one("input").attributes["value"] == "0"
    shown = page.one("section", id="key-numbers")
    cards = {name.text: value.text for name, value in zip(shown.all("dt"), shown.all("dd"), strict=True)}
    planned, other = grid["cells"][0][0]["numbers"], grid["cells"][machines.index("b200")][1]
    assert cards == planned
    assert planned["step"] == format_seconds(time.step_seconds)
    timeline = make_timeline(LARGE, h100)
    assert max(read_columns(page, "schedule", "backward")["right"]) == pytest.approx(timeline.length)
    idle = [row["idle"] for row in rows(page.one("table", id="table-stages"))]
    assert idle == [f"{share:.1%}" for share in list_idle_shares(replace(LARGE, time=time))]
    assert "Passes take the times that are estimated for h100" in words(page.text)
    expected = estimate_time(LARGE, b200, microbatches=16)
    assert other["numbers"]["tokens/s per GPU"] == f"{expected.tokens_per_second_per_gpu:,.0f}"
    assert other["numbers"]["global batch"] == "16"
    assert other["state"] == "fits"  # 180 GB
    assert other["limit"] == f"{b200.memory / GIB:,.3f} GiB"


def test_machines_without_fp8_are_not_offered_for_fp8() -> None:
    chunk = LARGE.stages[0].chunks[0]
    product = MatrixProduct(1024, 1024, 1024, 1, "float8")
    forward = PassCost(chunk.forward.operations._replace(products={product: 1}), [])
    stages = [replace(stage, chunks=[replace(stage.chunks[0], forward=forward)]) for stage in LARGE.stages]
    page = StrictParser(render_page(replace(LARGE, stages=stages), "a model", machine=load_machine("h100"))).root
    machines = [one.text for one in page.one("select").all("option")]
    assert set(list_machines()) - set(machines) == {"a100"}


def test_a_page_needs_the_packages_of_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    shown = CliRunner().invoke(plan_command, ["tiny", "--html", "plan.html"])
    assert shown.exit_code == 2
    assert "--html needs bokeh and jinja2: pip install 'bridge-dist[page]'" in shown.output
