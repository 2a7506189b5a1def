"""Machine speeds that a search estimates with."""

from __future__ import annotations

import pytest

from bridge.dist.layout import Layout
from bridge.dist.plan.forecast.machine import Machine

MACHINE = Machine(gpus_per_node=4, node_bandwidth=2, network_bandwidth=1)


@pytest.mark.parametrize(
    ("layout", "group", "stays_in_a_node"),
    [
        # Stages of ranks 0 to 3 and 4 to 7: a data-parallel group is a node.
        (Layout(pp=2, dp=4), "dp", [True, True]),
        (Layout(pp=2, cp=2, dp=2), "dp_cp", [True, True]),
        (Layout(dp=8), "dp", [False]),
        # Ranks 0 to 2 and 3 to 5: the second group has ranks on both sides of 4.
        (Layout(tp=3, dp=2), "tp", [False]),
        (Layout(tp=4, dp=2), "tp", [True]),
        # Experts are split by etp, independent of tp.
        (Layout(tp=4, dp=2, ep=2, etp=1), "tp_ep", [True]),
        (Layout(tp=4, dp=2, ep=4, etp=2), "tp_ep", [False]),
        (Layout(dp=8, etp=8), "expt_tp", [False]),
        (Layout(tp=4, dp=2, ep=2, etp=1), "ep", [True]),
        (Layout(dp=8, ep=2, etp=1), "expt_dp", [False]),
        (Layout(pp=2, dp=4, ep=2, etp=1), "expt_dp", [True, True]),
        # Ranks 0, 2, 4, 6: the second and the third stage are on different nodes.
        (Layout(pp=4, dp=2), "pp", [True, False, False, True]),
        (Layout(pp=2, dp=2), "embd", [True, True]),
        (Layout(pp=4, dp=2), "embd", [False, False, False, False]),
        (Layout(tp=2, cp=2, dp=2), "cp", [True]),
        (Layout(tp=4, cp=2), "tp_cp", [False]),
    ],
)
def test_the_bandwidth_of_a_group_is_that_of_its_slowest_link(
    layout: Layout, group: str, stays_in_a_node: list[bool]
) -> None:
    speeds = [MACHINE.bandwidth(group, layout, pp=pp) for pp in range(layout.pp)]
    assert speeds == [2 if stays else 1 for stays in stays_in_a_node]
