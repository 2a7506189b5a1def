"""The tables of a plan on the terminal."""

import re
from dataclasses import replace

import pytest
from example_plans import DEEP, GIB, LARGE, SMALL, render_on_terminal, sizes, words

from bridge.dist.plan.results import NOT_COVERED, RESERVED, Plan, Traffic


@pytest.mark.parametrize("plan", [SMALL, LARGE, DEEP], ids=["small", "large", "deep"])
def test_the_terminal_output_fits_80_columns_without_colour(plan: Plan) -> None:
    shown = render_on_terminal(plan)
    assert shown.isascii()
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    for statement in (*NOT_COVERED, "98,765,432,100, and 14,848 in buffers", "8,192 tokens", "planned in 2.5 s"):
        assert statement in words(shown)


def test_colour_adds_nothing_to_the_text() -> None:
    coloured = render_on_terminal(SMALL, colour=True)
    assert "\x1b" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == render_on_terminal(SMALL)


def test_the_worst_stages_come_first_and_equal_ones_share_a_row() -> None:
    rows = [line.split() for line in render_on_terminal(LARGE).splitlines() if "1,234,567,890" in line]
    assert [(row[0], row[1], row[3]) for row in rows] == [
        ("0", "1", "90.000!"),  # exceeds the memory of a GPU
        ("15", "1", "70.000"),
        ("1-14", "1", "60.000"),
    ]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("plan", "folded"), [(SMALL, [0, 1]), (LARGE, [0, 15, 1])], ids=["fits", "does not fit"])
def test_bars_are_proportional_to_memory(plan: Plan, folded: list[int], width: int) -> None:
    bars = re.findall(r"(W+G+O+A[A |]*)$", render_on_terminal(plan, width=width), re.MULTILINE)
    (limit,) = {bar.index("|") for bar in bars}
    assert limit > 0.2 * width
    for bar, pp in zip(bars, folded, strict=True):
        for letter, size in zip("WGOA", sizes(plan.stages[pp]), strict=True):
            assert bar.count(letter) == pytest.approx(size / (80 * GIB) * limit, abs=1)
        assert (bar.index("|") < bar.rindex("A")) == (plan.stages[pp].total_bytes > 80 * GIB)


def test_without_a_limit_the_worst_stage_has_the_longest_bar() -> None:
    first, second = re.findall(r"(W+G+O+A+) *$", render_on_terminal(replace(SMALL, gpu_memory=None)), re.MULTILINE)
    assert len(second) / len(first) == pytest.approx(60 / 76, abs=0.03)


def test_a_reserve_counts_towards_the_limit() -> None:
    plan = replace(SMALL, reserve_bytes=6 * GIB)  # 76 and 60 GiB of 80
    assert (SMALL.fits, plan.fits, replace(plan, gpu_memory=None).fits) == (True, False, None)
    assert plan.to_json()["reserve_bytes"] == 6 * GIB
    shown = render_on_terminal(plan)
    assert max(map(len, shown.splitlines())) <= 80
    assert "76.000 and the reserve of 6.000 of 80.000 GiB: does not fit, 2.000 GiB too much; 1 of 2" in words(shown)
    assert f"reserve 6.000 GiB per GPU, an estimate for {RESERVED}" in words(shown)
    assert "A activations  R reserve  | GPU 80.000 GiB\n" in shown
    first, second = re.findall(r"(W+G+O+A+[R |]+)$", shown, re.MULTILINE)
    assert first.rindex("R") > first.index("|") == second.index("|") > second.rindex("R")
    assert second.count("R") == pytest.approx(6 / 80 * second.index("|"), abs=1)


def test_traffic_is_shown_for_the_stage_that_sends_most() -> None:
    assert "tp 8 allgather 12 3.000 1" in words(render_on_terminal(SMALL))


def test_markup_in_values_is_shown_literally() -> None:
    traffic = [Traffic(group="[red]", ranks=2, operation="[/]", calls=1, bytes=1)]
    plan = replace(SMALL, wrap="[bold]x", stages=[replace(stage, traffic=traffic) for stage in SMALL.stages])
    shown = words(render_on_terminal(plan))
    assert "[red] 2 [/] 1" in shown
    assert "wrapped with [bold]x" in shown
