"""Simulated pipelines: published bubbles, and invariants of every schedule."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.dist.errors import LayoutError
from bridge.dist.layout import Layout
from bridge.dist.plan.count.schedule import Pass, list_passes
from bridge.dist.plan.forecast.timeline import Timeline, simulate


def _passes_by_rank(pp: int, vp: int, microbatches: int, group_size: int | None = None) -> list[list[Pass]]:
    layout = Layout(pp=pp, vp=vp)
    return [list_passes(layout, rank, microbatches, group_size=group_size) for rank in range(pp)]


def _simulate_equal_stages(pp: int, vp: int, microbatches: int, backward: float) -> Timeline:
    return simulate(_passes_by_rank(pp, vp, microbatches), forward=[[1.0] * vp] * pp, backward=[[backward] * vp] * pp)


@pytest.mark.parametrize("backward", [1.0, 2.0])
@pytest.mark.parametrize(("pp", "microbatches"), [(2, 1), (2, 8), (4, 4), (4, 6), (8, 64)])
def test_the_1f1b_bubble_matches_the_published_formula(pp: int, microbatches: int, backward: float) -> None:
    step = _simulate_equal_stages(pp, 1, microbatches, backward)
    assert step.length == pytest.approx((microbatches + pp - 1) * (1 + backward))
    assert step.bubbles == pytest.approx([(pp - 1) / (microbatches + pp - 1)] * pp)


@pytest.mark.parametrize("backward", [1.0, 2.0])
@pytest.mark.parametrize(("pp", "vp", "microbatches"), [(2, 2, 4), (2, 4, 8), (4, 2, 8), (4, 3, 16), (8, 2, 64)])
def test_the_interleaved_1f1b_bubble_matches_the_published_formula(
    pp: int, vp: int, microbatches: int, backward: float
) -> None:
    """Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters", 2021, section 2.2."""
    step = _simulate_equal_stages(pp, vp, microbatches, backward)
    assert step.length == pytest.approx((vp * microbatches + pp - 1) * (1 + backward))
    assert step.bubble == pytest.approx((pp - 1) / (vp * microbatches + pp - 1))


def test_one_rank_has_no_bubble() -> None:
    step = _simulate_equal_stages(1, 1, 3, 2.0)
    assert (step.length, step.bubbles, step.bubble) == (9.0, [0.0], 0.0)


def test_a_slow_rank_makes_the_others_wait() -> None:
    step = simulate(_passes_by_rank(2, 1, 10), forward=[[1.0], [3.0]], backward=[[2.0], [6.0]])
    assert step.length == 1 + 10 * 9 + 2  # the slow rank never waits after its start
    assert step.bubbles == pytest.approx([1 - 30 / 93, 1 - 90 / 93])


def test_stages_without_cost_take_no_time() -> None:
    assert simulate(_passes_by_rank(2, 1, 2), forward=[[0.0]] * 2, backward=[[0.0]] * 2).bubbles == [0.0, 0.0]


def test_deadlocked_schedules_are_refused() -> None:
    forward, backward = Pass(True, 0, 0), Pass(False, 0, 0)
    with pytest.raises(LayoutError, match="rank 0 at the backward pass of microbatch 0 through chunk 0"):
        simulate([[backward, forward], [forward, backward]], forward=[[1.0]] * 2, backward=[[1.0]] * 2)


@st.composite
def _pipelines(draw: st.DrawFn) -> tuple[list[list[Pass]], list[list[float]], list[list[float]]]:
    pp, vp = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    vp = vp if pp > 1 else 1
    group = draw(st.integers(pp, 2 * pp)) if vp > 1 else None
    # With a virtual pipeline, the last group may be smaller than the others, but not smaller than pp.
    rest = draw(st.sampled_from([0, *range(pp, group)])) if group else 0
    microbatches = draw(st.integers(1, 4)) * group + rest if group else draw(st.integers(1, 12))
    cost = st.lists(st.lists(st.integers(0, 9).map(float), min_size=vp, max_size=vp), min_size=pp, max_size=pp)
    return _passes_by_rank(pp, vp, microbatches, group), draw(cost), draw(cost)


@settings(max_examples=150, deadline=None)
@given(_pipelines())
def test_every_pass_runs_once_and_as_early_as_possible(
    pipeline: tuple[list[list[Pass]], list[list[float]], list[list[float]]],
) -> None:
    orders, forward, backward = pipeline
    step = simulate(orders, forward=forward, backward=backward)
    assert [[one.pass_ for one in rank] for rank in step.ranks] == orders

    # A microbatch passes forward through the chunks of all ranks, then backward in reverse order.
    way = [(chunk, rank) for chunk in range(len(forward[0])) for rank in range(len(orders))]
    found = {(one.pass_, rank): one for rank, timed in enumerate(step.ranks) for one in timed}
    earliest = dict.fromkeys(found, 0.0)
    for microbatch in range(max(one.microbatch for one in orders[0]) + 1):
        stations = [(Pass(True, chunk, microbatch), rank) for chunk, rank in way]
        stations += [(Pass(False, chunk, microbatch), rank) for chunk, rank in reversed(way)]
        for before, after in itertools.pairwise(stations):
            assert found[before].end <= found[after].start
            earliest[after] = max(earliest[after], found[before].end)
    for rank, timed in enumerate(step.ranks):
        for one, following in itertools.pairwise(timed):
            assert one.end <= following.start
            earliest[following.pass_, rank] = max(earliest[following.pass_, rank], one.end)
    assert {key: one.start for key, one in found.items()} == earliest

    for (what, rank), one in found.items():
        assert one.end - one.start == (forward if what.forward else backward)[rank][what.chunk]
    assert step.length == max(one.end for one in found.values())
    assert all(0 <= share <= 1 for share in step.bubbles)
