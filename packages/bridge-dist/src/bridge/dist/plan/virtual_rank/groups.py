"""The process groups of any rank of a job of any size, in one process: they know their ranks and send nothing.

Megatron's own initialiser makes every group of every rank (seconds, for ten thousand ranks); here one rank's are made,
with the same ranks in the same order, and put where it keeps them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._C._distributed_c10d import FakeProcessGroup, _register_process_group
from torch.distributed import ProcessGroup, distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from bridge.dist.engine.groups import embedding_members
from bridge.dist.layout import Layout
from bridge.dist.plan.virtual_rank.state import separate_state

# Axes vary fastest first, as in Megatron's order of ranks.
_DENSE = ("tp", "cp", "dp", "pp")
_EXPERT = ("etp", "ep", "edp", "pp")


class _Kept(NamedTuple):
    """Where Megatron keeps a group: along which axes, in a global variable, and the group's ranks in another."""

    axes: tuple[str, ...]
    group: str
    ranks: str | None = None


_GROUPS = (
    _Kept(("tp",), "_TENSOR_MODEL_PARALLEL_GROUP", "_TENSOR_MODEL_PARALLEL_GLOBAL_RANKS"),
    _Kept(("pp",), "_PIPELINE_MODEL_PARALLEL_GROUP", "_PIPELINE_GLOBAL_RANKS"),
    _Kept(("tp", "pp"), "_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GLOBAL_RANKS"),
    _Kept(("cp",), "_CONTEXT_PARALLEL_GROUP", "_CONTEXT_PARALLEL_GLOBAL_RANKS"),
    _Kept(("dp",), "_DATA_PARALLEL_GROUP", "_DATA_PARALLEL_GLOBAL_RANKS"),
    _Kept(("dp",), "_DATA_PARALLEL_GROUP_WITH_GTP_REMAT"),
    _Kept(("cp", "dp"), "_DATA_PARALLEL_GROUP_WITH_CP", "_DATA_PARALLEL_GLOBAL_RANKS_WITH_CP"),
    _Kept(("cp", "dp"), "_DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT"),
    _Kept(("cp", "dp"), "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP"),
    _Kept(("cp", "dp"), "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT"),
    _Kept(("tp", "dp"), "_TENSOR_AND_DATA_PARALLEL_GROUP"),
    _Kept(("tp", "cp", "dp"), "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP"),
    _Kept(("tp", "cp"), "_TENSOR_AND_CONTEXT_PARALLEL_GROUP"),
    _Kept((), "_GTP_WEIGHT_REMAT_GROUP", "_GTP_WEIGHT_REMAT_GLOBAL_RANKS"),
    _Kept((), "_EXPERT_GTP_WEIGHT_REMAT_GROUP", "_EXPERT_GTP_WEIGHT_REMAT_GLOBAL_RANKS"),
    _Kept(("ep",), "_EXPERT_MODEL_PARALLEL_GROUP", "_EXPERT_MODEL_PARALLEL_RANKS"),
    _Kept(("etp",), "_EXPERT_TENSOR_PARALLEL_GROUP"),
    _Kept(("etp", "ep"), "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP"),
    _Kept(("etp", "ep", "pp"), "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP"),
    _Kept(("etp", "ep", "pp"), "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP"),
    _Kept(("edp",), "_EXPERT_DATA_PARALLEL_GROUP"),
    _Kept(("edp",), "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP"),
    _Kept(("edp",), "_EXPERT_DATA_PARALLEL_GROUP_WITH_GTP_REMAT"),
    _Kept(("edp",), "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP_WITH_GTP_REMAT"),
    _Kept(("tp", "cp", "dp", "pp"), "_INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP"),
)


def rank_of(layout: Layout, **coordinates: int) -> int:
    """Return the rank at some coordinates along tp, cp, dp and pp; those not named are 0."""
    sizes, rank, stride = _sizes(layout), 0, 1
    for axis in _DENSE:
        rank += coordinates.get(axis, 0) * stride
        stride *= sizes[axis]
    return rank


@contextlib.contextmanager
def as_rank(
    layout: Layout, rank: int, *, embedding_ranks: Sequence[int] | None = None
) -> Iterator[ProcessGroupCollection]:
    """Be a rank of a job of this layout: Megatron's state and the default group say so until the context is left.

    ``embedding_ranks`` are those of ``create_process_groups``. No process group may exist outside. All else that
    Megatron keeps outside of models is that of a new process.
    """
    with separate_state():
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
        try:
            vars(parallel_state).update(_state(layout, rank, embedding_ranks))
            parallel_state._set_global_memory_buffer()
            groups: ProcessGroupCollection = ProcessGroupCollection.use_mpu_process_groups()
            yield groups
        finally:
            torch.distributed.destroy_process_group()


def ranks_along(layout: Layout, rank: int, axes: tuple[str, ...]) -> list[int]:
    """Return the ranks that differ from one along some axes only, in Megatron's order.

    The axes are tp, cp, dp and pp, or those of experts: etp, ep, edp (data parallelism of the same experts) and pp.
    """
    order = _DENSE if set(axes) <= set(_DENSE) else _EXPERT
    sizes, stride = _sizes(layout), 1
    found = [rank]
    for axis in order:
        if axis in axes:
            first = found[0] - rank // stride % sizes[axis] * stride
            found = [first - found[0] + at * stride + other for at in range(sizes[axis]) for other in found]
        stride *= sizes[axis]
    return found


def extents(layout: Layout, axes: tuple[str, ...], *, pp: int) -> Iterator[tuple[int, int]]:
    """Yield the lowest and the highest rank of each group along some axes, but pp, among the ranks of a pipeline stage.

    The axes are those of ``ranks_along``.
    """
    order = _DENSE if set(axes) <= set(_DENSE) else _EXPERT
    sizes, stride, span = _sizes(layout), 1, 0
    lowest = [0]
    for axis in order:
        if axis in axes:
            span += (sizes[axis] - 1) * stride
        else:
            places = [pp] if axis == "pp" else range(sizes[axis])
            lowest = [other + at * stride for at in places for other in lowest]
        stride *= sizes[axis]
    yield from ((rank, rank + span) for rank in lowest)


def _state(layout: Layout, rank: int, embedding_ranks: Sequence[int] | None) -> dict[str, Any]:
    """Megatron's global variables about groups."""
    state: dict[str, Any] = {}
    made: dict[tuple[str, ...], ProcessGroup] = {}
    for axes, group, ranks_of_group in _GROUPS:
        ranks = ranks_along(layout, rank, axes)
        if axes not in made:
            made[axes] = _fake_group(ranks, rank, name="-".join(axes))
        state[group] = made[axes]
        if ranks_of_group is not None:
            state[ranks_of_group] = ranks
    pipeline = state["_PIPELINE_GLOBAL_RANKS"]
    for kind, members in (
        ("_EMBEDDING", embedding_members(embedding_ranks)(pipeline)),
        ("_POSITION_EMBEDDING", parallel_state.default_position_embedding_ranks(pipeline)),
    ):
        state[f"{kind}_GROUP"] = _fake_group(members, rank, name=kind) if rank in members else None
        state[f"{kind}_GLOBAL_RANKS"] = members if rank in members else None
    virtual = layout.vp if layout.vp > 1 and layout.pp > 1 else None
    state["_VIRTUAL_PIPELINE_MODEL_PARALLEL_RANK"] = None if virtual is None else 0
    state["_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE"] = virtual
    return state


def _fake_group(ranks: list[int], rank: int, *, name: str) -> ProcessGroup:
    store = FakeStore()
    at = ranks.index(rank)
    group = ProcessGroup(store, at, len(ranks))
    backend = FakeProcessGroup._create_internal(at, len(ranks), None)
    for device in ("cpu", "cuda", "meta"):
        group._register_backend(torch.device(device), ProcessGroup.BackendType.CUSTOM, backend)
    group._set_default_backend(ProcessGroup.BackendType.CUSTOM)
    group._set_group_name(f"planned {name}")  # type: ignore[arg-type]  # torch 2.6 has no type for it
    world = distributed_c10d._world
    world.pg_group_ranks[group] = {member: index for index, member in enumerate(ranks)}
    world.pg_map[group] = ("fake", store)
    world.pg_names[group] = group.group_name
    _register_process_group(group.group_name, group)
    return group


def _sizes(layout: Layout) -> dict[str, int]:
    etp = layout.etp or layout.tp
    return {
        "tp": layout.tp,
        "cp": layout.cp,
        "dp": layout.dp,
        "pp": layout.pp,
        "etp": etp,
        "ep": layout.ep,
        "edp": layout.tp * layout.cp * layout.dp // (etp * layout.ep),
    }
