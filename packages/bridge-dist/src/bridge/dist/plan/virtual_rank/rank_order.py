"""The ranks of a group in Megatron's rank order: arithmetic, without torch."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.dist.layout import Layout

# The fastest-varying axis comes first, as in Megatron's rank order.
_DENSE = ("tp", "cp", "dp", "pp")
_EXPERT = ("etp", "ep", "edp", "pp")


def rank_of(layout: Layout, **coordinates: int) -> int:
    """Return the rank at the given coordinates along tp, cp, dp and pp; omitted ones are 0."""
    sizes, rank, stride = _sizes(layout), 0, 1
    for axis in _DENSE:
        rank += coordinates.get(axis, 0) * stride
        stride *= sizes[axis]
    return rank


def ranks_along(layout: Layout, rank: int, axes: tuple[str, ...]) -> list[int]:
    """Return the ranks that differ from ``rank`` only along the given axes, in Megatron's order.

    The axes are tp, cp, dp and pp, or those of experts: etp, ep, edp (expert-data-parallel) and pp.
    """
    order = _DENSE if set(axes) <= set(_DENSE) else _EXPERT
    sizes, stride = _sizes(layout), 1
    ranks = [rank]  # in ascending order, so the first one has the smallest coordinates so far
    for axis in order:
        if axis in axes:
            first = ranks[0] - rank // stride % sizes[axis] * stride
            ranks = [first - ranks[0] + index * stride + other for index in range(sizes[axis]) for other in ranks]
        stride *= sizes[axis]
    return ranks


def list_extents(layout: Layout, axes: tuple[str, ...], *, pp: int) -> Iterator[tuple[int, int]]:
    """Yield the lowest and highest rank of each group along the given axes in a pipeline stage.

    The axes are those of ``ranks_along``, without pp.
    """
    order = _DENSE if set(axes) <= set(_DENSE) else _EXPERT
    sizes, stride, span = _sizes(layout), 1, 0
    lowest = [0]
    for axis in order:
        if axis in axes:
            span += (sizes[axis] - 1) * stride
        else:
            places = [pp] if axis == "pp" else range(sizes[axis])
            lowest = [other + place * stride for place in places for other in lowest]
        stride *= sizes[axis]
    yield from ((rank, rank + span) for rank in lowest)


def _sizes(layout: Layout) -> dict[str, int]:
    assert layout.etp is not None
    return {
        "tp": layout.tp,
        "cp": layout.cp,
        "dp": layout.dp,
        "pp": layout.pp,
        "etp": layout.etp,
        "ep": layout.ep,
        "edp": layout.expert_dp,
    }
