"""What a plan says of a job: of each pipeline stage what one of its ranks holds, computes and sends in a step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

NOT_COVERED = (
    "fragmentation of the allocator, workspaces of kernels, buffers of NCCL, temporary tensors within a layer",
    "storage in 8- or 4-bit floats, CUDA graphs",
    "experts with more than their equal share of the tokens",
)
"""What a GPU holds beyond the plan."""


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """One virtual pipeline stage: its layers, counted from zero over the whole model, and what a microbatch takes.

    ``activation_bytes`` is what is kept from the forward to the backward pass; ``flops`` counts both, with what is
    computed again, ``forward_flops`` the first alone. Of a rank, as everything here.
    """

    vp_stage: int
    layers: list[int]
    parameters: int
    activation_bytes: int
    forward_flops: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a rank hands to one kind of collective in one kind of group in a step: how often, and bytes in all.

    The bytes are those of the larger side: the whole of what is gathered, reduced or exchanged.
    """

    group: str
    ranks: int
    operation: str
    calls: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What a rank of a pipeline stage holds and does: the ranks beside it (tensor, data, expert parallel) alike.

    ``activation_bytes`` is the peak over Megatron's schedule, ``buckets`` the elements of each bucket of gradients,
    padding included, ``flops`` those of a step. ``unsharded_bytes`` is the most that a wrapper which shards
    weights makes whole at a time: weights, gradients, what is gathered and reduced. The sum with the peak of
    activations, which may be at another moment, bounds what a rank holds.
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
    """A job: its layout by axis, its batch, and its pipeline stages.

    ``parameters`` counts every parameter of the model once, without the padding of the vocabulary; ``buffers`` what
    else a checkpoint holds, such as biases of routers. ``layers`` says on whose layers activations were measured.
    ``microbatch_group_size`` is Megatron's ``microbatch_group_size_per_vp_stage``. ``gpu_memory`` is in bytes, None
    where none was given.
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
        """The stage whose ranks hold most."""
        return max(self.stages, key=lambda stage: stage.total_bytes)

    @property
    def fits(self) -> bool | None:
        """Whether every rank's total fits the memory of a GPU; None where none was given."""
        return None if self.gpu_memory is None else self.worst.total_bytes <= self.gpu_memory

    @property
    def imbalance(self) -> float:
        """FLOPs of the busiest stage over the mean."""
        flops = [stage.flops for stage in self.stages]
        return max(flops) * len(flops) / sum(flops)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data, with what follows from it."""
        derived = {"fits": self.fits, "imbalance": self.imbalance, "worst": self.worst.pp}
        return {"kind": "plan"} | asdict(self) | derived
