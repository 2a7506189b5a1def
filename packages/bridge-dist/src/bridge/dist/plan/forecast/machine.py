"""How fast the GPUs of a machine compute and talk: what a step's time is estimated with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bridge.dist.layout import Layout
from bridge.dist.plan.results import StagePlan
from bridge.dist.plan.virtual_rank.rank_order import extents, rank_of


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a step's time is estimated with: a GPU's FLOPs a second and the share of them that is reached, GPUs that
    share a node, and bytes a second to a GPU from others of its node and from other nodes.

    The defaults are those of a node of eight H100: 989 TFLOPs of dense bf16, NVLink, and 400 Gb/s a GPU.
    """

    flops: float = 989e12
    efficiency: float = 0.5
    gpus_per_node: int = 8
    node_bandwidth: float = 450e9
    network_bandwidth: float = 50e9

    def seconds(self, stage: StagePlan, layout: Layout) -> dict[str, float]:
        """Return how long a stage's own work takes in a step, by kind, none of it at the same time as another."""
        found = {"computation": stage.flops / (self.flops * self.efficiency)}
        for sent in stage.traffic:
            kind = f"{sent.group} traffic"
            found[kind] = found.get(kind, 0.0) + sent.bytes / self.bandwidth(sent.group, layout, pp=stage.pp)
        return found

    def bandwidth(self, group: str, layout: Layout, *, pp: int) -> float:
        """Return that within a node if each group of a kind in a pipeline stage has all its ranks in one node.

        Ranks are placed in Megatron's order, and those of the slowest group keep the others waiting.
        """
        nodes = ((low // self.gpus_per_node, high // self.gpus_per_node) for low, high in _extents(group, layout, pp))
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
"""Along what the groups within a pipeline stage are, by the names that a plan gives them."""


def _extents(group: str, layout: Layout, pp: int) -> Iterator[tuple[int, int]]:
    """Yield the lowest and the highest rank of each group of a kind that a stage has ranks in."""
    if group in _AXES:
        yield from extents(layout, _AXES[group], pp=pp)
        return
    if group not in ("pp", "embd"):
        yield 0, layout.world_size - 1
        return
    # A rank sends to those of the stages beside its own; embeddings are on the first and the last.
    first, last = (max(pp - 1, 0), min(pp + 1, layout.pp - 1)) if group == "pp" else (0, layout.pp - 1)
    ranks_of_stage = rank_of(layout, pp=1)
    yield from ((first * ranks_of_stage + rank, last * ranks_of_stage + rank) for rank in range(ranks_of_stage))
