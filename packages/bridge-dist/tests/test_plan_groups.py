"""A planned rank has the same process groups as a rank of Megatron."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core import parallel_state

from bridge.dist.layout import Layout
from bridge.dist.plan.virtual_rank.groups import act_as_rank
from bridge.dist.plan.virtual_rank.rank_order import list_extents, ranks_along

LAYOUTS = [
    Layout(tp=2, pp=2, vp=2, dp=2, etp=2),
    Layout(tp=2, cp=2, dp=2, etp=2),
    Layout(tp=2, ep=4, dp=4, etp=1),
    Layout(tp=1, pp=2, cp=2, ep=4, dp=4, etp=2),
    Layout(tp=4, pp=2, dp=2, ep=2, etp=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_planned_groups_match_megatrons_groups(layout: Layout) -> None:
    """Compare the groups of every rank with those that Megatron creates under torch's fake backend."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from bridge.dist import create_process_groups, destroy_process_groups

    for rank in range(layout.world_size):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
        create_process_groups(layout)
        expected = group_variables()
        destroy_process_groups()
        torch.distributed.destroy_process_group()
        with act_as_rank(layout, rank):
            assert group_variables() == expected


def group_variables() -> dict[str, Any]:
    """Return Megatron's global variables about groups, without the gloo groups, which plans do not have."""
    import torch

    found: dict[str, Any] = {}
    for name, value in vars(parallel_state).items():
        if name.isupper() and "GLOO" not in name and ("GROUP" in name or "RANK" in name):
            if isinstance(value, torch.distributed.ProcessGroup):
                found[name] = (torch.distributed.get_process_group_ranks(value), value.rank(), value.size())
            elif value is None or isinstance(value, int | list):
                found[name] = value
    return found


@pytest.mark.parametrize("axes", [("tp",), ("cp",), ("dp",), ("cp", "dp"), ("ep",), ("etp",), ("etp", "ep"), ("edp",)])
def test_groups_of_a_stage_span_their_first_to_last_rank(axes: tuple[str, ...]) -> None:
    layout = Layout(tp=2, pp=3, cp=2, ep=4, dp=4, etp=1)
    for pp in range(3):
        stage = range(16 * pp, 16 * (pp + 1))
        groups = {tuple(ranks_along(layout, rank, axes)) for rank in stage}
        assert sorted(list_extents(layout, axes, pp=pp)) == sorted((min(group), max(group)) for group in groups)
