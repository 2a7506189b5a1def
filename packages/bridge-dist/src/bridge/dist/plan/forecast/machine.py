"""Speeds of a machine's GPUs and network, for estimates of step time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bridge.dist.layout import Layout
from bridge.dist.plan.results import StagePlan
from bridge.dist.plan.virtual_rank.rank_order import list_extents, rank_of


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Speeds of a machine: peak FLOPs per second of a GPU, achieved share, GPUs per node, and bytes per second to
    a GPU within a node and between nodes.

    The defaults are those of nodes with eight H100: 989 TFLOPs of dense bf16, NVLink with 450 GB/s in each direction,
    and a network with 400 Gb/s per GPU.
    """

    flops: float = 989e12
    efficiency: float = 0.5
    gpus_per_node: int = 8
    node_bandwidth: float = 450e9
    network_bandwidth: float = 50e9

    def seconds(self, stage: StagePlan, layout: Layout) -> dict[str, float]:
        """Return the seconds of a stage's own work in a step by kind, without overlap."""
        seconds = {"computation": stage.flops / (self.flops * self.efficiency)}
        for sent in stage.traffic:
            kind = f"{sent.group} traffic"
            seconds[kind] = seconds.get(kind, 0.0) + sent.bytes / self.bandwidth(sent.group, layout, pp=stage.pp)
        return seconds

    def bandwidth(self, group: str, layout: Layout, *, pp: int) -> float:
        """Return the bandwidth of a kind of group: within a node only if no group of the stage spans nodes.

        Ranks are placed in Megatron's order; the slowest group determines the time.
        """
        nodes = (
            (low // self.gpus_per_node, high // self.gpus_per_node) for low, high in _list_extents(group, layout, pp)
        )
        return self.node_bandwidth if all(low == high for low, high in nodes) else self.network_bandwidth


_AXES = {
    "tp": ("tp",),
    "cp": ("cp",),
    "tp_cp": ("tp", "cp"),
    "dp": ("dp",),
    "dp_cp": ("cp", "dp"),
    "ep": ("ep",),
    "expt_tp": ("etp",),
    "tp_ep": ("etp", "ep"),
    "expt_dp": ("edp",),
}
"""The axes of each kind of group within a pipeline stage."""


def _list_extents(group: str, layout: Layout, pp: int) -> Iterator[tuple[int, int]]:
    """Yield the lowest and highest rank of each group of a kind with ranks in a stage."""
    if group in _AXES:
        yield from list_extents(layout, _AXES[group], pp=pp)
        return
    if group not in ("pp", "embd"):
        yield 0, layout.world_size - 1  # an unknown kind: assume that it spans the whole job
        return
    # A rank sends to the neighbouring stages; embeddings are on the first and last stage.
    first, last = (max(pp - 1, 0), min(pp + 1, layout.pp - 1)) if group == "pp" else (0, layout.pp - 1)
    ranks_of_stage = rank_of(layout, pp=1)
    yield from ((first * ranks_of_stage + rank, last * ranks_of_stage + rank) for rank in range(ranks_of_stage))
