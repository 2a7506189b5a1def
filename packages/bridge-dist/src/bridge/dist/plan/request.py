"""The request of `bridge plan`. Importing this module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from bridge.dist.layout import Layout
from bridge.dist.plan.layers import Layers
from bridge.dist.train.batch import Batch
from bridge.dist.wrapper import ShardingStrategy, Wrapper


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """Values from the command line; None if the model, its layout or the other values decide.

    ``make_plan_options`` in ``bridge.dist.plan.plan`` fills in the rest. ``gpu_memory`` and ``reserve`` are in bytes.
    """

    tp: int | None = None
    pp: int | None = None
    vp: int | None = None
    cp: int | None = None
    ep: int | None = None
    etp: int | None = None
    dp: int | None = None
    gpus: int | None = None
    wrapper: Wrapper = Wrapper.DDP
    distributed_optimizer: bool = False
    sharding_strategy: ShardingStrategy | None = None
    micro_batch_size: int = 1
    global_batch_size: int | None = None
    seq_length: int | None = None
    gpu_memory: int | None = None
    reserve: int | None = None
    layers: Layers | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The requested layout sizes by axis, without dp, which a configuration does not hold."""
        sizes = {"tp": self.tp, "pp": self.pp, "vp": self.vp, "cp": self.cp, "ep": self.ep, "etp": self.etp}
        return {axis: size for axis, size in sizes.items() if size is not None}

    def make_batch(self, layout: Layout, *, seq_length: int) -> Batch:
        """Return the batch of samples of this length: by default one microbatch per rank, or two per pipeline stage."""
        # A multiple of pp, because the interleaved schedule requires one.
        microbatches = 2 * layout.pp if layout.pp > 1 else 1
        return Batch(
            seq_length=seq_length,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size or self.micro_batch_size * layout.dp * microbatches,
        )
