"""Process groups for any rank of a job of any size, in one process. They know their ranks and send nothing.

Megatron's own initialiser creates every group of every rank, which takes seconds for ten thousand ranks. This module
creates only those of one rank, with the same ranks in the same order, and stores them in Megatron's variables.
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

from bridge.dist.engine.groups import make_embedding_selector
from bridge.dist.layout import Layout
from bridge.dist.plan.virtual_rank.rank_order import ranks_along
from bridge.dist.plan.virtual_rank.state import isolate_state


class _GroupSlot(NamedTuple):
    """The axes of a group, and the global variables in which Megatron keeps the group and its ranks."""

    axes: tuple[str, ...]
    group: str
    ranks: str | None = None


# Variables of `parallel_state` in megatron-core 0.19.2.
_GROUPS = (
    _GroupSlot(("tp",), "_TENSOR_MODEL_PARALLEL_GROUP", "_TENSOR_MODEL_PARALLEL_GLOBAL_RANKS"),
    _GroupSlot(("pp",), "_PIPELINE_MODEL_PARALLEL_GROUP", "_PIPELINE_GLOBAL_RANKS"),
    _GroupSlot(("tp", "pp"), "_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GLOBAL_RANKS"),
    _GroupSlot(("cp",), "_CONTEXT_PARALLEL_GROUP", "_CONTEXT_PARALLEL_GLOBAL_RANKS"),
    _GroupSlot(("dp",), "_DATA_PARALLEL_GROUP", "_DATA_PARALLEL_GLOBAL_RANKS"),
    _GroupSlot(("dp",), "_DATA_PARALLEL_GROUP_WITH_GTP_REMAT"),
    _GroupSlot(("cp", "dp"), "_DATA_PARALLEL_GROUP_WITH_CP", "_DATA_PARALLEL_GLOBAL_RANKS_WITH_CP"),
    _GroupSlot(("cp", "dp"), "_DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT"),
    _GroupSlot(("cp", "dp"), "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP"),
    _GroupSlot(("cp", "dp"), "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT"),
    _GroupSlot(("tp", "dp"), "_TENSOR_AND_DATA_PARALLEL_GROUP"),
    _GroupSlot(("tp", "cp", "dp"), "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP"),
    _GroupSlot(("tp", "cp"), "_TENSOR_AND_CONTEXT_PARALLEL_GROUP"),
    _GroupSlot((), "_GTP_WEIGHT_REMAT_GROUP", "_GTP_WEIGHT_REMAT_GLOBAL_RANKS"),
    _GroupSlot((), "_EXPERT_GTP_WEIGHT_REMAT_GROUP", "_EXPERT_GTP_WEIGHT_REMAT_GLOBAL_RANKS"),
    _GroupSlot(("ep",), "_EXPERT_MODEL_PARALLEL_GROUP", "_EXPERT_MODEL_PARALLEL_RANKS"),
    _GroupSlot(("etp",), "_EXPERT_TENSOR_PARALLEL_GROUP"),
    _GroupSlot(("etp", "ep"), "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP"),
    _GroupSlot(("etp", "ep", "pp"), "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP"),
    _GroupSlot(("etp", "ep", "pp"), "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP"),
    _GroupSlot(("edp",), "_EXPERT_DATA_PARALLEL_GROUP"),
    _GroupSlot(("edp",), "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP"),
    _GroupSlot(("edp",), "_EXPERT_DATA_PARALLEL_GROUP_WITH_GTP_REMAT"),
    _GroupSlot(("edp",), "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP_WITH_GTP_REMAT"),
    _GroupSlot(("tp", "cp", "dp", "pp"), "_INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP"),
)


@contextlib.contextmanager
def act_as_rank(
    layout: Layout, rank: int, *, embedding_ranks: Sequence[int] | None = None
) -> Iterator[ProcessGroupCollection]:
    """Act as a rank of a job within a context: set up Megatron's state and the default group for it.

    ``embedding_ranks`` is as in ``create_process_groups``. No process group may exist outside the context. Megatron's
    other global state is that of a new process.
    """
    with isolate_state():
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
        try:
            vars(parallel_state).update(_group_variables(layout, rank, embedding_ranks))
            parallel_state._set_global_memory_buffer()  # as `initialize_model_parallel` does
            groups: ProcessGroupCollection = ProcessGroupCollection.use_mpu_process_groups()
            yield groups
        finally:
            torch.distributed.destroy_process_group()


def _group_variables(layout: Layout, rank: int, embedding_ranks: Sequence[int] | None) -> dict[str, Any]:
    """Return the values of Megatron's global variables for groups."""
    state: dict[str, Any] = {}
    made: dict[tuple[str, ...], ProcessGroup] = {}
    for axes, group, ranks_of_group in _GROUPS:
        ranks = ranks_along(layout, rank, axes)
        if axes not in made:
            made[axes] = _make_fake_group(ranks, rank, name="-".join(axes))
        state[group] = made[axes]
        if ranks_of_group is not None:
            state[ranks_of_group] = ranks
    pipeline = state["_PIPELINE_GLOBAL_RANKS"]
    for kind, members in (
        ("_EMBEDDING", make_embedding_selector(embedding_ranks)(pipeline)),
        ("_POSITION_EMBEDDING", parallel_state.default_position_embedding_ranks(pipeline)),
    ):
        # None on ranks outside of them, as in Megatron.
        state[f"{kind}_GROUP"] = _make_fake_group(members, rank, name=kind) if rank in members else None
        state[f"{kind}_GLOBAL_RANKS"] = members if rank in members else None
    virtual = layout.vp if layout.vp > 1 else None
    state["_VIRTUAL_PIPELINE_MODEL_PARALLEL_RANK"] = None if virtual is None else 0
    state["_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE"] = virtual
    return state


def _make_fake_group(ranks: list[int], rank: int, *, name: str) -> ProcessGroup:
    store = FakeStore()
    index = ranks.index(rank)
    group = ProcessGroup(store, index, len(ranks))
    backend = FakeProcessGroup._create_internal(index, len(ranks), None)
    for device in ("cpu", "cuda", "meta"):
        group._register_backend(torch.device(device), ProcessGroup.BackendType.CUSTOM, backend)
    group._set_default_backend(ProcessGroup.BackendType.CUSTOM)
    group._set_group_name(f"planned {name}")  # type: ignore[arg-type]  # torch 2.6 has no type for it
    # Register the group as `torch.distributed.new_group` does (private names of torch 2.15).
    world = distributed_c10d._world
    world.pg_group_ranks[group] = {member: place for place, member in enumerate(ranks)}
    world.pg_map[group] = ("fake", store)
    world.pg_names[group] = group.group_name
    _register_process_group(group.group_name, group)
    return group
