"""What a build made, per rank and stage, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from bridge.dist.run.memory import PeakMemory


@dataclass(frozen=True, kw_only=True)
class ChunkReport:
    """One wrapped stage: its layers (indices in the whole model), its own parameters, its wrappers, outermost first."""

    vp_stage: int
    layers: list[int]
    parameters: int
    wrappers: list[str]


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """The stages of one rank, its coordinates in the layout, and its peak memory from the build to the last step."""

    rank: int
    tp: int
    pp: int
    dp: int
    cp: int
    ep: int
    chunks: list[ChunkReport]
    peak_memory_bytes: PeakMemory


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """The whole of a build, and what made it.

    ``layers`` says whose layers were built. ``parameters`` are the model's, ``padded_parameters`` count vocabulary
    padding too. The sizes of a batch are None if nothing was trained. ``step_seconds`` is the mean over the steps but
    the first, which warms up, on the slowest rank; None if there was no other. ``model_flops`` are those that the model
    needs for a step (``bridge.dist.train.flops``), ``device_peak_flops`` those that a rank's device does in a second
    at most, in dense bf16; None for devices that are not known, and in full precision. ``document`` is as the ranks
    got it: ``overrides`` and layout are written into it.
    """

    world_size: int
    layout: dict[str, int]
    wrap: str
    distributed_optimizer: bool
    layers: str
    device: Literal["cuda", "cpu"]
    device_name: str | None
    device_peak_flops: float | None
    seq_length: int | None
    micro_batch_size: int | None
    global_batch_size: int | None
    parameters: int
    padded_parameters: int
    ranks: list[RankReport]
    losses: list[float]
    grad_norms: list[float | None]
    step_seconds: float | None
    model_flops: int | None
    document: dict[str, Any]
    overrides: list[str]
    versions: dict[str, str]

    @property
    def tokens_per_second_per_gpu(self) -> float | None:
        """Tokens of a step, by its time and the number of ranks; None if no step was timed."""
        if self.step_seconds is None or self.global_batch_size is None or self.seq_length is None:
            return None
        return self.global_batch_size * self.seq_length / self.step_seconds / self.world_size

    @property
    def model_flops_utilization(self) -> float | None:
        """FLOPs that the model needs, by those that the devices could have done; None if one of them is unknown."""
        if self.step_seconds is None or self.model_flops is None or self.device_peak_flops is None:
            return None
        return self.model_flops / (self.step_seconds * self.world_size * self.device_peak_flops)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        derived = {
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "model_flops_utilization": self.model_flops_utilization,
        }
        return {"kind": "build"} | asdict(self) | derived
