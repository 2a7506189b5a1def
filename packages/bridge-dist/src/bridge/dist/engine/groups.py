"""Megatron's process groups, made from a layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed
import torch.distributed.distributed_c10d
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from bridge.dist.checks.agreement import LONGEST_WAIT, agree_in_world, collect_facts
from bridge.dist.engine.release import clear_sharding_caches, release_cuda_graphs, release_sharded_models
from bridge.dist.errors import LayoutError
from bridge.dist.layout import Layout


def get_layout(config: TransformerConfig, pg_collection: ProcessGroupCollection) -> Layout:
    """Return the layout of process groups. The virtual pipeline has no group and comes from the configuration."""
    return Layout(
        tp=pg_collection.tp.size(),
        pp=pg_collection.pp.size(),
        vp=config.virtual_pipeline_model_parallel_size or 1,
        cp=pg_collection.cp.size(),
        ep=pg_collection.ep.size() if hasattr(pg_collection, "ep") else 1,
        etp=pg_collection.expt_tp.size() if hasattr(pg_collection, "expt_tp") else None,
        dp=pg_collection.dp.size(),
    )


def get_embedding_ranks(pg_collection: ProcessGroupCollection) -> list[int] | None:
    """Return the pipeline ranks in the embedding group, on each rank of the pipeline; None if there is no such group.

    Collective over the pipeline.
    """
    if pg_collection.pp.size() == 1:
        return None
    group = getattr(pg_collection, "embd", None)
    mine: list[int] | None = None
    if isinstance(group, torch.distributed.ProcessGroup):
        pipeline = torch.distributed.get_process_group_ranks(pg_collection.pp)
        mine = [pipeline.index(rank) for rank in torch.distributed.get_process_group_ranks(group)]
    everyone: list[list[int] | None] = [None] * pg_collection.pp.size()
    torch.distributed.all_gather_object(everyone, mine, group=pg_collection.pp)
    return next((ranks for ranks in everyone if ranks is not None), None)


def create_process_groups(
    layout: Layout,
    *,
    timeout: timedelta = LONGEST_WAIT,
    optimizer_instances: int = 1,
    embedding_ranks: Sequence[int] | None = None,
) -> ProcessGroupCollection:
    """Create Megatron's process groups for a layout in the initialised world, and return this rank's.

    Collective: every rank calls it with the same layout. The world may be of any backend, the fake one too.

    Args:
        layout: The sizes.
        timeout: How long a collective of any of these groups may wait for the other ranks.
        optimizer_instances: Copies of the distributed optimizer's state, each sharded over its own part of the
            data-parallel ranks.
        embedding_ranks: The pipeline ranks that hold the word embedding or a copy, see
            ``bridge.dist.layout.find_embedding_ranks``; by default the first and the last.

    Raises:
        AgreementError: The ranks call it with different arguments.
        LayoutError: The sizes of the world and the layout differ, or the data-parallel ranks do not divide into the
            optimizer instances.
    """
    agree_in_world(
        collect_facts(layout=layout, optimizer_instances=optimizer_instances, embedding_ranks=embedding_ranks)
    )
    world_size = torch.distributed.get_world_size()
    if world_size != layout.world_size:
        raise LayoutError(f"the layout {layout} needs {layout.world_size} ranks, but the world has {world_size}")
    if (layout.dp * layout.cp) % optimizer_instances:
        raise LayoutError(
            f"{optimizer_instances} optimizer instances do not divide the {layout.dp * layout.cp} ranks of "
            f"dp x cp = {layout.dp} x {layout.cp}: choose a divisor"
        )
    fake = torch.distributed.get_backend() == "fake"
    global _existing
    _existing = frozenset(_list_groups())  # those of the caller, which destroy_process_groups keeps
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        num_distributed_optimizer_instances=optimizer_instances,
        get_embedding_ranks=make_embedding_selector(embedding_ranks),  # type: ignore[arg-type]  # called with the ranks alone
        create_gloo_process_groups=not fake,  # gloo would wait for the other ranks
        distributed_timeout_minutes=timeout / timedelta(minutes=1),  # type: ignore[arg-type]  # fractions are fine
    )
    if not fake:
        # megatron-core 0.19.2 sets no timeout for the gloo group of expert data parallelism.
        for group in _list_groups():
            if group not in _existing:
                _set_timeout(timeout, group)
    groups: ProcessGroupCollection = ProcessGroupCollection.use_mpu_process_groups()
    return groups


def make_embedding_selector(ranks: Sequence[int] | None) -> Callable[[list[int]], list[int]]:
    """Return the callback by which Megatron selects the members of an embedding group from a pipeline's ranks."""
    if ranks is None:
        return parallel_state.default_embedding_ranks
    return lambda pipeline: [pipeline[rank] for rank in ranks]


def destroy_process_groups() -> None:
    """Destroy Megatron's process groups and all that were made after them, such as FSDP's. The world stays."""
    parallel_state.destroy_model_parallel()  # only drops its references to them
    release_cuda_graphs()
    release_sharded_models()
    # megatron-core 0.19.2 caches the results of these with the module as key. The module holds its group, and under
    # Megatron-FSDP, through hooks, the whole model.
    for rotary in (RotaryEmbedding, YarnRotaryEmbedding):
        rotary.forward.cache_clear()
    for group in _list_groups():
        if group not in _existing and group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    clear_sharding_caches()


# torch 2.15 has the public function and deprecates the private one; torch 2.6 has only the private one.
_set_timeout = getattr(torch.distributed, "set_timeout", None) or torch.distributed.distributed_c10d._set_pg_timeout

_existing: frozenset[torch.distributed.ProcessGroup] = frozenset()
"""The groups that existed before Megatron's."""


def _list_groups() -> list[torch.distributed.ProcessGroup]:
    return list(torch.distributed.distributed_c10d._world.pg_map)
