"""The results of a plan: memory, computation and communication of one rank of each pipeline stage, for one step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

NOT_COVERED = (
    "fragmentation of the allocator, workspaces of kernels, buffers of NCCL, temporary tensors within a layer",
    "storage in 8- or 4-bit floats, CUDA graphs",
    "experts with more than their equal share of the tokens",
)
"""GPU memory that a plan does not cover."""


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """One virtual pipeline stage on a rank: its layers (indices in the whole model) and the cost of a microbatch.

    ``activation_bytes`` are kept from the forward to the backward pass. ``flops`` counts both passes, including
    recomputation; ``forward_flops`` the forward pass.
    """

    vp_stage: int
    layers: list[int]
    parameters: int
    activation_bytes: int
    forward_flops: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Calls of one operation in one kind of group by a rank in a step, and their total bytes.

    The bytes are those of the larger side: the full gathered, reduced or exchanged tensor.
    """

    group: str
    ranks: int
    operation: str
    calls: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Memory and work of one rank of a pipeline stage; the other ranks of the stage are the same.

    ``activation_bytes`` is the peak over Megatron's schedule. ``buckets`` holds the elements of each gradient bucket,
    including padding. ``flops`` are those of a step. ``unsharded_bytes`` is the peak of unsharded weights, gradients
    and communication buffers under a wrapper that shards weights. ``total_bytes`` is an upper bound, because this
    peak and that of activations may not coincide.
    """

    pp: int
    rank: int
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    master_bytes: int
    state_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    unsharded_bytes: int
    total_bytes: int
    flops: int
    buckets: list[int]
    chunks: list[ChunkPlan]
    traffic: list[Traffic]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a job: its layout by axis, its batch, and its pipeline stages.

    ``parameters`` counts every parameter of the model once, without vocabulary padding; ``buffers`` counts the buffers
    that a checkpoint holds, such as router biases. ``layers`` names the library of the measured layers.
    ``microbatch_group_size`` is Megatron's ``microbatch_group_size_per_vp_stage``. ``gpu_memory`` is in bytes, None
    if unknown.
    """

    world_size: int
    layout: dict[str, int]
    wrap: str
    distributed_optimizer: bool
    layers: str
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    microbatches: int
    microbatch_group_size: int | None
    parameters: int
    buffers: int
    gpu_memory: int | None
    stages: list[StagePlan]
    seconds: float

    @property
    def worst(self) -> StagePlan:
        """The stage whose ranks need the most memory."""
        return max(self.stages, key=lambda stage: stage.total_bytes)

    @property
    def fits(self) -> bool | None:
        """Whether every rank fits the memory of a GPU; None if that is unknown."""
        return None if self.gpu_memory is None else self.worst.total_bytes <= self.gpu_memory

    @property
    def imbalance(self) -> float:
        """FLOPs of the busiest stage over the mean."""
        flops = [stage.flops for stage in self.stages]
        return max(flops) * len(flops) / sum(flops)

    def to_json(self) -> dict[str, Any]:
        """Return the plan and its derived values as plain data."""
        derived = {"fits": self.fits, "imbalance": self.imbalance, "worst": self.worst.pp}
        return {"kind": "plan"} | asdict(self) | derived
