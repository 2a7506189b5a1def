"""The report of a build, per rank and stage. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from bridge.dist.run.peak_memory import PeakMemory


@dataclass(frozen=True, kw_only=True)
class ChunkReport:
    """One wrapped stage: its layers (indices in the whole model), parameter count, and wrappers, outermost first."""

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
    """A build: its job, its ranks, its training steps.

    ``sharding_strategy`` is what Megatron-FSDP shards; None with other wrappers.
    ``layers`` names the library of the layers, ``fusions`` the fields of fusions that were set because its layers have
    them. ``parameters`` excludes vocabulary padding, ``padded_parameters`` includes it. Batch sizes are None if nothing
    was trained. ``iteration`` counts the training steps behind the model, those of a loaded checkpoint included;
    ``losses`` and ``grad_norms`` are of the last ones. ``saved`` is the folder that the model was saved to as this
    iteration; None if it was not saved. ``step_seconds`` is the mean on the slowest rank without the first step, which
    warms up; None if there was no other step. ``model_flops`` are the FLOPs that the model needs for a step
    (``bridge.dist.train.flops``). ``device_peak_flops`` is the dense bf16 peak per second of a rank's device; None for
    unknown devices and in full precision. ``weights`` is the path that the initial weights were loaded from; None if
    they were drawn. ``document`` includes ``overrides`` and the layout.
    """

    world_size: int
    layout: dict[str, int]
    wrap: str
    distributed_optimizer: bool
    sharding_strategy: str | None
    weights: str | None
    layers: str
    fusions: list[str]
    device: Literal["cuda", "cpu"]
    device_name: str | None
    device_peak_flops: float | None
    seq_length: int | None
    micro_batch_size: int | None
    global_batch_size: int | None
    parameters: int
    padded_parameters: int
    ranks: list[RankReport]
    iteration: int
    saved: str | None
    losses: list[float]
    grad_norms: list[float | None]
    step_seconds: float | None
    model_flops: int | None
    document: dict[str, Any]
    overrides: list[str]
    versions: dict[str, str]

    @property
    def tokens_per_second_per_gpu(self) -> float | None:
        """Tokens per second and rank; None if no step was timed."""
        if self.step_seconds is None or self.global_batch_size is None or self.seq_length is None:
            return None
        return self.global_batch_size * self.seq_length / self.step_seconds / self.world_size

    @property
    def model_flops_utilization(self) -> float | None:
        """FLOPs of the model over the peak FLOPs of the devices in that time; None if one of them is unknown."""
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
