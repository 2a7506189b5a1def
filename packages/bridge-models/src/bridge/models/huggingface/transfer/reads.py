"""Count the bytes that each rank of a layout reads from a folder, without ranks and without reading them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from bridge.config import Document, ModelConfig
from bridge.dist.cpu import on_meta
from bridge.dist.engine.placement import Placement, named_tensors
from bridge.dist.engine.stages import build_stages
from bridge.dist.job import BuildJob
from bridge.dist.layout import Layout
from bridge.dist.plan.virtual_rank.groups import act_as_rank
from bridge.dist.plan.virtual_rank.rank_order import rank_of
from bridge.dist.wrapper import Wrapper
from bridge.models.huggingface.folder.folder import Folder
from bridge.models.huggingface.transfer.load import match_stages, share_rows
from bridge.models.huggingface.transfer.names import canonicalize_name
from bridge.models.huggingface.transfer.regions import find_regions
from bridge.models.huggingface.transfer.tensors import count_bytes
from bridge.models.huggingface.weights.weight import Part


@dataclass(frozen=True, kw_only=True)
class Reads:
    """The ranks of a pipeline stage that read equally many bytes."""

    pp: int
    ranks: list[int]
    bytes: int
    """Of one rank, including its share of the tensors that are compared because one repeats the other."""


def count_reads(folder: Folder, document: Document, world_size: int | None = None) -> list[Reads]:
    """Return how many bytes each rank reads in ``load_weights``.

    One rank of each pipeline stage is built on the meta device.

    Args:
        folder: The folder.
        document: Its document with a layout.
        world_size: Number of ranks; None for as many as the layout needs.

    Raises:
        LayoutError: The layout does not fit ``world_size`` ranks.
        WeightsError: The document is of another model.
    """
    job = BuildJob(document=document.data, wrapper=Wrapper.NONE)
    layout = Layout.of(job.make_builder(document.config()).transformer_config, world_size)
    found = []
    for pp in range(layout.pp):
        first = rank_of(layout, pp=pp)
        held = _build_stages(folder, job, layout, first)
        ranks: dict[int, list[int]] = {}
        for rank, size in enumerate(_count_each_rank(folder, layout, held), start=first):
            size += _count_compared(folder, rank, layout.world_size)
            ranks.setdefault(size, []).append(rank)
        found += [Reads(pp=pp, ranks=same, bytes=size) for size, same in ranks.items()]
    return found


@dataclass(frozen=True, slots=True)
class _Held:
    """A parameter or buffer of the first rank of a pipeline stage, by its name in the weight table."""

    name: str
    placement: Placement
    is_expert: bool


def _build_stages(folder: Folder, job: BuildJob, layout: Layout, rank: int) -> list[_Held]:
    config = ModelConfig.from_dict(job.document)
    with on_meta(), act_as_rank(layout, rank, embedding_ranks=job.find_embedding_ranks(config)) as groups:
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        job.finalize(config, layout.world_size)
        builder = job.make_builder(config)
        transformer = builder.transformer_config
        transformer.perform_initialization = False  # meta tensors have no values
        vp_size = transformer.virtual_pipeline_model_parallel_size
        stages = build_stages(builder.build_model, groups, vp_size=vp_size)
        match_stages(stages, folder, groups)
        return [
            # Megatron sets `allreduce` to False on the parameters of experts.
            _Held(canonicalize_name(placement.full_name), placement, not getattr(tensor, "allreduce", True))
            for stage in stages
            for placement, tensor in named_tensors(stage, groups)
        ]


def _count_each_rank(folder: Folder, layout: Layout, held: Sequence[_Held]) -> Iterator[int]:
    """Yield the bytes of each rank of a pipeline stage, in order: its parameters are those of the first rank.

    Ranks differ by the rows that they hold, and by their experts.
    """
    etp = layout.etp or layout.tp
    experts_per_rank = (folder.fields["transformer.num_moe_experts"] or 0) // layout.ep

    @cache
    def count_others(shard: int) -> int:
        return sum(_count(folder, one.name, one.placement, shard) for one in held if not one.is_expert)

    @cache
    def count_experts(shard: int, ep: int) -> int:
        return sum(
            _count(folder, _name_expert(one.name, ep * experts_per_rank), one.placement, shard)
            for one in held
            if one.is_expert
        )

    for index in range(layout.world_size // layout.pp):  # tensor-parallel ranks are neighbours, then expert-parallel
        yield count_others(index % layout.tp) + count_experts(index % etp, index // etp % layout.ep)


def _name_expert(name: str, offset: int) -> str:
    """Return the name of the parameter of the expert with a number that is higher by ``offset``."""
    return re.sub(r"(?<=\.linear_fc[12]\.)(weight|bias)(\d+)$", lambda m: f"{m[1]}{int(m[2]) + offset}", name)


def _count(folder: Folder, name: str, placement: Placement, shard: int) -> int:
    _, parts = folder.match.weights[name]
    shard = shard if placement.shards > 1 else 0
    return sum(
        count_bytes(folder.stored[region.part.tensor], region.part, region.rows, region.columns)
        for region in find_regions(parts, replace(placement, shard=shard))
    )


def _count_compared(folder: Folder, rank: int, ranks: int) -> int:
    """Return the bytes that a rank compares of tensors that repeat others."""
    found = 0
    for one in folder.match.repeated:
        for stored in (folder.stored[one.tensor], folder.stored[one.of]):
            rows = share_rows(stored.shape[0], rank=rank, ranks=ranks)
            found += count_bytes(stored, Part("", stored.shape, rows), rows, slice(None))
    return found
