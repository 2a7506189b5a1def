"""What `bridge plan` is asked for. Importing this module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from bridge.dist.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A job as far as the command line gives it; None where the model, its layout or the other values decide.

    ``plan_options`` of ``bridge.dist.plan.plan`` decides. ``gpu_memory`` is in bytes.
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
    micro_batch_size: int = 1
    global_batch_size: int | None = None
    seq_length: int | None = None
    gpu_memory: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the layout that are given, by axis, but dp, which is none of a configuration's."""
        sizes = {"tp": self.tp, "pp": self.pp, "vp": self.vp, "cp": self.cp, "ep": self.ep, "etp": self.etp}
        return {axis: size for axis, size in sizes.items() if size is not None}
