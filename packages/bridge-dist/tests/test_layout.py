"""Process groups have the ranks of their definition, in fake worlds, and leave nothing behind when destroyed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed
from ranks import run_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from bridge.dist import Layout, create_process_groups, destroy_process_groups
from bridge.dist.errors import LayoutError


def layouts(world_size: int) -> Iterator[Layout]:
    """Yield every layout of a world: all divisors for tp, cp, pp and dp, and all ep that fit a stage."""
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    for tp, cp, pp in itertools.product(sizes, repeat=3):
        if world_size % (tp * cp * pp) == 0:
            dp = world_size // (tp * cp * pp)
            for ep in sizes:
                if (tp * cp * dp) % (tp * ep) == 0:
                    yield Layout(tp=tp, cp=cp, pp=pp, dp=dp, ep=ep)


def expected_ranks(layout: Layout, rank: int) -> dict[str, list[int]]:
    """Return, by group, the ranks that share all coordinates with this one except those of the group.

    Megatron's rank order is tp (fastest), cp, dp, pp; for expert layers it is etp (fastest), ep, edp, pp.
    """
    edp = layout.tp * layout.cp * layout.dp // (layout.etp * layout.ep)  # type: ignore[operator]
    dense = {"tp": layout.tp, "cp": layout.cp, "dp": layout.dp, "pp": layout.pp}
    expert = {"tp": layout.etp, "ep": layout.ep, "dp": edp, "pp": layout.pp}

    def coordinates(number: int, sizes: dict[str, int]) -> dict[str, int]:
        found = {}
        for name, size in sizes.items():
            number, found[name] = divmod(number, size)
        return found

    def along(sizes: dict[str, int], *names: str) -> list[int]:
        mine = coordinates(rank, sizes)
        return [
            other
            for other in range(layout.world_size)
            if all(value == mine[name] for name, value in coordinates(other, sizes).items() if name not in names)
        ]

    return {
        "tp": along(dense, "tp"),
        "cp": along(dense, "cp"),
        "dp": along(dense, "dp"),
        "pp": along(dense, "pp"),
        "mp": along(dense, "tp", "pp"),
        "dp_cp": along(dense, "dp", "cp"),
        "tp_cp": along(dense, "tp", "cp"),
        "ep": along(expert, "ep"),
        "expt_tp": along(expert, "tp"),
        "expt_dp": along(expert, "dp"),
    }


@pytest.fixture
def fake_world(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    rank, world_size = request.param
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    yield rank, world_size
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("fake_world", [(r, 4) for r in range(4)] + [(r, 8) for r in (0, 3, 6)], indirect=True)
def test_groups_match_their_definition_in_every_layout(fake_world: tuple[int, int]) -> None:
    rank, world_size = fake_world
    pg_map = torch.distributed.distributed_c10d._world.pg_map
    for layout in layouts(world_size):
        before = set(pg_map)
        groups = create_process_groups(layout)
        found = {
            name: torch.distributed.get_process_group_ranks(getattr(groups, name))
            for name in expected_ranks(layout, rank)
        }
        assert found == expected_ranks(layout, rank), layout
        destroy_process_groups()
        assert set(pg_map) == before


@pytest.mark.parametrize("fake_world", [(0, 4)], indirect=True)
def test_a_world_of_another_size_is_refused(fake_world: tuple[int, int]) -> None:
    with pytest.raises(LayoutError, match="needs 8 ranks, but the world has 4"):
        create_process_groups(Layout(tp=8))


def timeouts_of_groups() -> set[timedelta]:
    """Return the timeouts of all groups of a build, including those that wrappers and the optimizer create."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bridge.config import Document

    pg_map = torch.distributed.distributed_c10d._world.pg_map
    world = set(pg_map)
    config = Document.load("tiny").config()
    found: set[timedelta] = set()
    for fsdp in ({"use_megatron_fsdp": True}, {"use_torch_fsdp2": True}):
        groups = create_process_groups(Layout(dp=2), timeout=timedelta(seconds=77))
        model_parallel_cuda_manual_seed(1)
        builder = config.get_builder_cls()(config)
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer="use_megatron_fsdp" in fsdp, gradient_reduce_div_fusion=False
        )
        builder.build_distributed_models(groups, ddp_config, **fsdp)
        made = set(pg_map) - world
        assert len(made) > 10
        found |= {group._get_backend(torch.device("cpu")).options._timeout for group in made}
        destroy_process_groups()
    return found


def test_the_timeout_applies_to_every_group() -> None:
    assert run_ranks(timeouts_of_groups, 2) == [{timedelta(seconds=77)}] * 2


def leaked_resources(times: int) -> tuple[int, int, int]:
    """Create and destroy all groups several times; return how many groups, open files and threads were added."""

    def count_resources() -> tuple[int, int, int]:
        threads = len(os.listdir("/proc/self/task"))
        return len(torch.distributed.distributed_c10d._world.pg_map), len(os.listdir("/proc/self/fd")), threads

    def create_and_destroy() -> None:
        create_process_groups(Layout(tp=2), optimizer_instances=1)
        destroy_process_groups()
        torch.distributed.barrier()

    create_and_destroy()
    before = count_resources()
    for _ in range(times):
        create_and_destroy()
    after = count_resources()
    return after[0] - before[0], after[1] - before[1], after[2] - before[2]


def test_destroyed_groups_leave_nothing_behind() -> None:
    for groups, files, threads in run_ranks(leaked_resources, 2, 20):
        assert groups == 0
        assert files <= 2
        assert threads <= 2
