"""The results of a plan: memory, computation and communication of one rank of each pipeline stage, for one step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from bridge.dist.wrapper import ShardingStrategy, Wrapper

NOT_COVERED = (
    "temporary tensors within a layer",
    "CUDA graphs, an optimizer offloaded to CPUs",
    "experts with more than their equal share of the tokens",
)
"""GPU memory that a plan does not cover."""

RESERVED = "the CUDA context, buffers of NCCL, workspaces of kernels and fragmentation of the allocator"
"""GPU memory that a plan does not count, and keeps free as a reserve."""


def default_reserve(world_size: int) -> int:
    """Return the bytes to keep free on each GPU for ``RESERVED``: an estimate, with its source in docs/plan.md."""
    return (1 if world_size == 1 else 4) * 2**30


class MatrixProduct(NamedTuple):
    """The shape of a product of [m, k] and [k, n], or of a batch of them, and the data type of its inputs."""

    m: int
    n: int
    k: int
    batch: int
    dtype: str


class AttentionCall(NamedTuple):
    """The sizes of a call of an attention kernel; ``heads`` counts those of all samples.

    ``causal`` is set for any mask: masks of decoders are causal, or narrower.
    """

    heads: int
    queries: int
    keys: int
    query_width: int
    value_width: int
    causal: bool
    backward: bool


class Operations(NamedTuple):
    """Operations of a pass by their number of calls, and the bytes of activations around matrix products."""

    products: dict[MatrixProduct, int]
    attention: dict[AttentionCall, int]
    activation_bytes: int


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


class PassCost(NamedTuple):
    """Operations and traffic of the forward or the backward pass of a microbatch through a chunk."""

    operations: Operations
    traffic: list[Traffic]


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """One virtual pipeline stage on a rank: its layers (indices in the whole model) and the cost of a microbatch.

    ``activation_bytes`` are kept from the forward to the backward pass, which exceeds them by ``temporary_bytes`` when
    it holds the gradients of the logits, or what it has recomputed. ``flops`` counts both passes, including
    recomputation; ``forward_flops`` the forward pass, ``weight_gradient_flops`` the part of the backward pass that
    computes gradients of weights. ``received_bytes`` come from the previous virtual stage for each microbatch, and
    ``sent_bytes`` go to the next one.
    """

    vp_stage: int
    layers: list[int]
    parameters: int
    activation_bytes: int
    temporary_bytes: int
    forward_flops: int
    flops: int
    weight_gradient_flops: int
    forward: PassCost
    backward: PassCost
    received_bytes: int
    sent_bytes: int


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Memory and work of one rank of a pipeline stage; the other ranks of the stage are the same.

    ``activation_bytes`` is the peak over Megatron's schedule, including what microbatches share and the temporary bytes
    of a backward pass. ``buckets`` holds the elements of each gradient bucket, including padding. ``flops`` are those
    of a step. ``unsharded_bytes`` is the peak of unsharded weights, gradients and communication buffers under a wrapper
    that shards weights.
    ``total_bytes`` is an upper bound, because this peak and that of activations may not coincide.
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
class ProductTime:
    """Matrix products of one shape in a step: number of calls and estimated seconds."""

    product: MatrixProduct
    calls: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """What training on a number of tokens takes; ``cost`` is in the currency of ``price``, which is for a GPU-hour."""

    tokens: int
    days: float
    gpu_hours: float
    price: float | None
    cost: float | None


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Estimated time of a step on a machine, and its parts by cause, which add up to it.

    The parts are those of a rank of ``stage``, the busiest pipeline stage. ``idle_seconds`` has the time that a rank of
    each stage waits for others in the pipeline. ``products`` has the matrix products of the busiest stage by shape, the
    slowest first. ``validated`` tells how far estimates for such jobs are from published runs.
    """

    machine: str
    microbatches: int
    step_seconds: float
    tokens_per_second_per_gpu: float
    model_flops_utilization: float
    parts: dict[str, float]
    stage: int
    idle_seconds: list[float]
    products: list[ProductTime]
    validated: str
    training: TrainingCost | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as plain data."""
        products = [one.product._asdict() | {"calls": one.calls, "seconds": one.seconds} for one in self.products]
        return asdict(self) | {"products": products}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The command that made a plan, its overrides, and the versions of the libraries that affect it."""

    command: str
    overrides: list[str]
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a job: its layout by axis, its batch, and its pipeline stages.

    ``sharding_strategy`` is what Megatron-FSDP shards; None with other wrappers. ``parameters`` counts every parameter
    of the model once, without vocabulary padding; ``buffers`` counts the buffers that a checkpoint holds, such as
    router biases. ``layers`` names the library of the measured layers, ``fusions`` the fields of fusions that were set
    because its layers have them, ``left_out`` those of the model that the plan does not count.
    ``microbatch_group_size`` is Megatron's ``microbatch_group_size_per_vp_stage``. ``gpu_memory`` is in bytes, None if
    unknown. ``reserve_bytes`` of it stay free for ``RESERVED``; no stage's total includes them. ``model_flops`` are
    those of a step, as in build reports. ``has_experts`` tells whether the model has experts. ``overlapped`` lists the
    groups whose communication within layers the model overlaps with computation. ``has_cuda_graphs`` tells whether the
    model has its kernels launched by CUDA graphs. ``time`` is an estimate for one machine.
    """

    world_size: int
    layout: dict[str, int]
    wrap: str
    distributed_optimizer: bool
    sharding_strategy: ShardingStrategy | None
    layers: str
    fusions: list[str]
    left_out: list[str]
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    microbatches: int
    microbatch_group_size: int | None
    parameters: int
    buffers: int
    gpu_memory: int | None
    reserve_bytes: int
    model_flops: int
    has_experts: bool
    overlapped: list[str]
    stages: list[StagePlan]
    seconds: float
    has_cuda_graphs: bool = False
    time: StepTime | None = None

    @property
    def shards_weights(self) -> bool:
        """Whether the wrapper shards every weight over the data-parallel ranks."""
        return self.wrap == Wrapper.TORCH_FSDP2 or self.sharding_strategy is ShardingStrategy.OPTIM_GRADS_PARAMS

    @property
    def product_dtypes(self) -> set[str]:
        """The data types of the inputs of matrix products."""
        chunks = [chunk for stage in self.stages for chunk in stage.chunks]
        return {product.dtype for chunk in chunks for product in chunk.forward.operations.products}

    @property
    def worst(self) -> StagePlan:
        """The stage whose ranks need the most memory."""
        return max(self.stages, key=lambda stage: stage.total_bytes)

    @property
    def fits(self) -> bool | None:
        """Whether every rank and the reserve fit the memory of a GPU; None if that is unknown."""
        return None if self.gpu_memory is None else not self.exceeds_memory(self.worst)

    def exceeds_memory(self, stage: StagePlan) -> bool:
        """Return whether the ranks of a stage and the reserve need more memory than a GPU is known to have."""
        return self.gpu_memory is not None and stage.total_bytes + self.reserve_bytes > self.gpu_memory

    @property
    def imbalance(self) -> float:
        """FLOPs of the busiest stage over the mean."""
        flops = [stage.flops for stage in self.stages]
        return max(flops) * len(flops) / sum(flops)

    def to_json(self) -> dict[str, Any]:
        """Return the plan and its derived values as plain data."""
        derived = {"fits": self.fits, "imbalance": self.imbalance, "worst": self.worst.pp}
        data = asdict(replace(self, time=None)) | derived
        for stage in data["stages"]:
            for chunk in stage["chunks"]:
                del chunk["forward"], chunk["backward"]  # too long; the time lists the matrix products by shape
        return {"kind": "plan"} | data | {"time": self.time.to_json() if self.time else None}
