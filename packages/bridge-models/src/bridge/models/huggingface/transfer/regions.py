"""Which rows of which tensors make up the part of a parameter that this rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron.core.transformer import TransformerConfig

from bridge.config.errors import Problem
from bridge.dist.engine.placement import Placement
from bridge.models.huggingface.weights.weight import Part, Repetition


@dataclass(frozen=True, slots=True)
class Region:
    """Rows of a rank's parameter, and the rows and columns of a tensor that they are."""

    local: slice
    part: Part
    rows: range
    columns: slice


def find_regions(parts: Sequence[Part], placement: Placement) -> Iterator[Region]:
    """Yield the overlaps of a rank's rows with the parts of a parameter, in the order of the rank's rows.

    Rows beyond the last part, which pad the vocabulary, are in no region.
    """
    pieces, columns = _find_pieces(placement)
    local = 0
    for piece in pieces:
        start = 0
        for part in parts:
            stop = start + len(part.rows)
            first, last = max(piece.start, start), min(piece.stop, stop)
            if first < last:
                here = local + first - piece.start
                rows = part.rows[first - start : last - start]
                yield Region(slice(here, here + last - first), part, rows, columns)
            start = stop
        local += len(piece)


def check_row_order(config: TransformerConfig) -> list[Problem]:
    """Check that the rows of gate and up projections do not alternate, for a fused kernel of Transformer Engine."""
    names = ("moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size")
    return [
        Problem(f"transformer.{name}", "is set, so rows are in another order than in a folder: set it to null")
        for name in names
        if getattr(config, name) is not None
    ]


def cut_regions(regions: Iterable[Region], first: int, last: int) -> Iterator[Region]:
    """Yield what regions have of the local rows from ``first`` to ``last``, which become rows 0 and on."""
    for region in regions:
        start, stop = max(region.local.start, first), min(region.local.stop, last)
        if start < stop:
            rows = region.rows[start - region.local.start : stop - region.local.start]
            yield replace(region, local=slice(start - first, stop - first), rows=rows)


def repeat_regions(regions: Iterable[Region], repetitions: Sequence[Repetition]) -> list[Region]:
    """Return regions, and those of the tensors that repeat theirs."""
    found = list(regions)
    return found + [
        replace(region, part=replace(region.part, tensor=one.tensor))
        for one in repetitions
        for region in found
        if region.part.tensor == one.of
    ]


def _find_pieces(placement: Placement) -> tuple[list[range], slice]:
    """Return the rows of the whole parameter that a rank holds, and the columns."""
    shape, shards, shard = placement.full_shape, placement.shards, placement.shard
    if shards == 1:
        return [range(shape[0])], slice(None)
    if placement.dim == 1:
        width = placement.shape[1]
        return [range(shape[0])], slice(shard * width, (shard + 1) * width)
    sizes = placement.blocks or (placement.shape[0] // placement.stride,) * placement.stride
    pieces, start = [], 0
    for size in sizes:
        first = start + shard * size
        pieces.append(range(first, first + size))
        start += size * shards
    return pieces, slice(None)
