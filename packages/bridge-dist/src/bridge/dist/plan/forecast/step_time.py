"""The time of a step on a machine: a roofline for each operation, collectives by group, and Megatron's schedule.

Matrix products take 2 m n k FLOPs at the machine's speed, lower for small dimensions, or as long as reading and writing
their matrices, whichever is longer. Attention takes its FLOPs, halved by a mask. The other kernels take as long as
reading and writing the activations around matrix products. A pass takes the sum of these and of its communication,
except what is hidden; without CUDA graphs, experts exchange tokens with a latency. The step takes as long as Megatron's
schedule of these passes, then gradients are reduced, the optimizer updates, and weights are gathered.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from bridge.dist.layout import Layout
from bridge.dist.plan.count.schedule import list_passes
from bridge.dist.plan.forecast.accuracy import describe_accuracy
from bridge.dist.plan.forecast.machine import Machine
from bridge.dist.plan.forecast.timeline import Timeline, simulate
from bridge.dist.plan.results import (
    AttentionCall,
    ChunkPlan,
    MatrixProduct,
    Operations,
    Plan,
    ProductTime,
    StagePlan,
    StepTime,
    Traffic,
    TrainingCost,
)
from bridge.dist.wrapper import ShardingStrategy, Wrapper

PRODUCTS, ATTENTION, MEMORY_BOUND = "matrix products", "attention", "memory-bound work"
BUBBLE, OPTIMIZER = "pipeline bubble", "optimizer"
_HALF_SPEED = 32
"""A dimension of a matrix product of this size halves its speed."""
_PASSES = 1.5
"""How often memory-bound kernels pass over an activation beside a matrix product: norms, rotary positions, residual
additions and SwiGLU of a Llama layer move 1.5 times the bytes of these activations."""
_EXCHANGE_PASSES = 4
"""Tokens are permuted before and after they are exchanged; each time, a kernel reads and writes them."""
_BYTES = {"float8": 1, "float32": 4}
_FSDP = (Wrapper.MEGATRON_FSDP, Wrapper.TORCH_FSDP2)
_DATA_PARALLEL = ("dp", "dp_cp", "expt_dp")
_EXPERT_PARALLEL = ("ep", "tp_ep")


def estimate_time(plan: Plan, machine: Machine, *, microbatches: int | None = None) -> StepTime:
    """Estimate the time of a step of a plan on a machine, without building anything.

    Args:
        plan: The plan.
        machine: The machine.
        microbatches: Microbatches per step on each data-parallel rank, if other than planned. The global batch changes
            with them.
    """
    count = microbatches or plan.microbatches
    layout = Layout(**plan.layout)
    timed: dict[int, dict[str, float]] = {}
    stages = [_StageTime(plan, stage, machine, timed) for stage in plan.stages]
    busiest = max(stages, key=lambda stage: stage.busy)
    length = compute_length(
        layout,
        forward=[stage.forward for stage in stages],
        backward=[stage.backward for stage in stages],
        microbatches=count,
        group_size=plan.microbatch_group_size,
    )
    parts = {cause: seconds * count for cause, seconds in busiest.parts.items()}
    idle = [length - stage.busy * count for stage in stages]
    parts[BUBBLE] = min(idle)
    _add_parts(parts, busiest.end_step(count))
    seconds = sum(parts.values())
    tokens = plan.global_batch_size * plan.seq_length * count / plan.microbatches
    return StepTime(
        machine=machine.name,
        microbatches=count,
        step_seconds=seconds,
        tokens_per_second_per_gpu=tokens / seconds / plan.world_size,
        model_flops_utilization=plan.model_flops
        * (count / plan.microbatches)
        / (seconds * plan.world_size * machine.bf16_flops),
        parts=dict(sorted(((cause, time) for cause, time in parts.items() if time > 0), key=lambda part: -part[1])),
        stage=busiest.stage.pp,
        idle_seconds=idle,
        products=busiest.list_products(count),
        validated=describe_accuracy(plan, machine),
    )


def compute_training_cost(plan: Plan, time: StepTime, *, tokens: int, price: float | None) -> TrainingCost:
    """Return what training on a number of tokens takes if every step takes the estimated time.

    Args:
        plan: The plan.
        time: The estimated time of its steps.
        tokens: The number of tokens.
        price: The price of a GPU-hour, if known.
    """
    hours = tokens / (time.tokens_per_second_per_gpu * plan.world_size) / 3600
    gpu_hours = hours * plan.world_size
    return TrainingCost(
        tokens=tokens,
        days=hours / 24,
        gpu_hours=gpu_hours,
        price=price,
        cost=None if price is None else gpu_hours * price,
    )


class _StageTime:
    """Times of a rank of a pipeline stage: of its passes, by cause for a microbatch, and of the end of a step."""

    def __init__(self, plan: Plan, stage: StagePlan, machine: Machine, timed: dict[int, dict[str, float]]) -> None:
        """Time a stage; ``timed`` caches the times of operations, which equal chunks share, by identity."""
        self.plan, self.stage, self.machine, self.layout = plan, stage, machine, Layout(**plan.layout)
        self._timed = timed
        self.parts: dict[str, float] = {}
        self.forward: list[float] = []
        self.backward: list[float] = []
        self.inside: list[tuple[float, float]] = []
        """Seconds of both passes through each chunk, without messages to other stages and adding up gradients."""
        for chunk in stage.chunks:
            inside = []
            for is_forward, seconds in ((True, self.forward), (False, self.backward)):
                parts = self._time_pass(chunk, is_forward=is_forward)
                _add_parts(self.parts, parts)
                seconds.append(sum(parts.values()))
                inside.append(seconds[-1] - parts.get(_communication("pp"), 0.0))
            self.inside.append((inside[0], inside[1] - time_gradients(chunk.parameters, machine)))

    @property
    def busy(self) -> float:
        """Seconds of a microbatch in all chunks."""
        return sum(self.forward) + sum(self.backward)

    def _time_pass(self, chunk: ChunkPlan, *, is_forward: bool) -> dict[str, float]:
        cost = chunk.forward if is_forward else chunk.backward
        key = id(cost.operations)
        if key not in self._timed:
            self._timed[key] = time_operations(cost.operations, self.machine)
        parts = dict(self._timed[key])
        if not is_forward:
            parts[MEMORY_BOUND] += time_gradients(chunk.parameters, self.machine)
        # What ranks exchange is permuted before and after.
        exchanged = sum(one.bytes for one in cost.traffic if one.operation.startswith("alltoall"))
        parts[MEMORY_BOUND] += exchanged * _EXCHANGE_PASSES / self.machine.memory_speed
        computation = sum(parts.values())
        for group, seconds in self._sum_traffic(cost.traffic).items():
            if group in _DATA_PARALLEL and self.plan.wrap in _FSDP:
                continue  # gathers and reduces ahead of the computation, see `end_step`
            if group in self.plan.overlapped or (group == "tp_ep" and "ep" in self.plan.overlapped):
                seconds *= self.machine.exposed
            elif group == "cp":  # passes keys and values on while attention computes with others
                seconds = max(0.0, seconds - parts[ATTENTION])
            parts[_communication(group)] = seconds
        # A pass receives its input or passes on its output while its neighbours wait, unless others run meanwhile.
        message = Traffic(
            group="pp",
            ranks=self.layout.pp,
            operation="send",
            calls=1,
            bytes=chunk.sent_bytes if is_forward else chunk.received_bytes,
        )
        if message.bytes:
            seconds = self.machine.traffic_seconds(message, self.layout, pp=self.stage.pp)
            parts[_communication("pp")] = max(0.0, seconds - computation) if self.layout.vp > 1 else seconds
        return parts

    def _sum_traffic(self, traffic: Sequence[Traffic]) -> dict[str, float]:
        seconds: dict[str, float] = defaultdict(float)
        for one in traffic:
            seconds[one.group] += self.machine.traffic_seconds(one, self.layout, pp=self.stage.pp)
            if one.operation.startswith("alltoall") and one.group in _EXPERT_PARALLEL and not self.plan.has_cuda_graphs:
                seconds[one.group] += one.calls * self.machine.exchange_latency
        return seconds

    def end_step(self, microbatches: int) -> dict[str, float]:
        """Return the exposed time of gathering and reducing outside the passes, and that of the optimizer."""
        parts: dict[str, float] = defaultdict(float)
        outside = self._list_traffic_outside_passes()
        gathers = [one for one in outside if one.operation.startswith("allgather")]
        others = [one for one in outside if not one.operation.startswith("allgather")]
        if self.plan.shards_weights:
            parts |= self._time_repeated(outside, microbatches, hidden=self.busy)
        else:
            if self.plan.sharding_strategy == ShardingStrategy.OPTIM_GRADS:
                reduced = [one for one in others if one.group in _DATA_PARALLEL]
                others = [one for one in others if one not in reduced]
                parts |= self._time_repeated(reduced, microbatches, hidden=sum(self.backward))
            # DDP reduces gradients during the last backward pass, bucket by bucket, and gathers weights during the
            # first forward pass. Megatron-FSDP, which has no such buckets, does both while nothing else runs.
            for traffic, hidden in ((others, sum(self.backward)), (gathers, sum(self.forward))):
                for group, seconds in self._sum_traffic(traffic).items():
                    last = seconds / max(1, len(self.stage.buckets))
                    is_hidden = group in _DATA_PARALLEL
                    parts[_communication(group)] += max(last, seconds - hidden) if is_hidden else seconds
        # Adam reads and writes weights and moments, and reads gradients twice: for their norm, and to update.
        updated = self.stage.state_bytes / 8
        moved = 2 * self.stage.optimizer_bytes + 8 * updated + 2 * updated + self.stage.gradient_bytes
        parts[OPTIMIZER] = moved / self.machine.memory_speed
        return parts

    def _time_repeated(self, traffic: Sequence[Traffic], microbatches: int, *, hidden: float) -> dict[str, float]:
        """Return the exposed time of what each microbatch gathers or reduces, of which computation hides a part.

        Args:
            traffic: The traffic of the planned step.
            microbatches: The number of microbatches.
            hidden: Seconds of computation of a microbatch.
        """
        repeated, parts = microbatches / self.plan.microbatches, {}
        for group, seconds in self._sum_traffic(traffic).items():
            calls = sum(one.calls for one in traffic if one.group == group)
            parts[_communication(group)] = max(seconds / calls, seconds * repeated - hidden * microbatches)
        return parts

    def _list_traffic_outside_passes(self) -> list[Traffic]:
        """Return the traffic of a step that no pass contains; with FSDP, all of the data-parallel groups."""
        calls: Counter[tuple[str, int, str]] = Counter()
        size: Counter[tuple[str, int, str]] = Counter()

        def add(traffic: Traffic, times: int) -> None:
            key = (traffic.group, traffic.ranks, traffic.operation)
            calls[key] += times * traffic.calls
            size[key] += times * traffic.bytes

        for one in self.stage.traffic:
            add(one, 1)
        for chunk in self.stage.chunks:
            for one in (*chunk.forward.traffic, *chunk.backward.traffic):
                if not (one.group in _DATA_PARALLEL and self.plan.wrap in _FSDP):
                    add(one, -self.plan.microbatches)
        return [
            Traffic(group=group, ranks=ranks, operation=operation, calls=number, bytes=size[group, ranks, operation])
            for (group, ranks, operation), number in calls.items()
            if number > 0 and group != "pp"
        ]

    def list_products(self, microbatches: int) -> list[ProductTime]:
        """Return the matrix products of a step by shape, the slowest first."""
        calls: Counter[MatrixProduct] = Counter()
        for chunk in self.stage.chunks:
            for cost in (chunk.forward, chunk.backward):
                calls.update(cost.operations.products)
        timed = [
            ProductTime(
                product=product,
                calls=number * microbatches,
                seconds=number * microbatches * time_product(product, self.machine),
            )
            for product, number in calls.items()
        ]
        return sorted(timed, key=lambda one: -one.seconds)


def make_timeline(plan: Plan, machine: Machine | None) -> Timeline:
    """Return the timeline of the passes of a plan's step: in seconds on a machine, without one in FLOPs."""
    if machine is None:
        forward = [[float(chunk.forward_flops) for chunk in stage.chunks] for stage in plan.stages]
        backward = [[float(chunk.flops - chunk.forward_flops) for chunk in stage.chunks] for stage in plan.stages]
    else:
        timed: dict[int, dict[str, float]] = {}
        stages = [_StageTime(plan, stage, machine, timed) for stage in plan.stages]
        forward, backward = [stage.forward for stage in stages], [stage.backward for stage in stages]
    return _simulate(Layout(**plan.layout), forward, backward, plan.microbatches, plan.microbatch_group_size)


def list_chunk_times(plan: Plan, machine: Machine) -> list[list[tuple[float, float]]]:
    """Return the seconds of the forward and the backward pass of a microbatch through each chunk of each stage.

    They contain nothing that depends on the rest of the layout: messages between stages, and adding up gradients.
    """
    timed: dict[int, dict[str, float]] = {}
    return [_StageTime(plan, stage, machine, timed).inside for stage in plan.stages]


def time_gradients(elements: float, machine: Machine) -> float:
    """Return the time in which a microbatch adds up full-precision gradients, which are read and written."""
    return 8 * elements / machine.memory_speed


def time_activations(size: float, machine: Machine) -> float:
    """Return the time of the kernels between matrix products, from the bytes that those read and write."""
    return size * _PASSES / machine.memory_speed


def time_operations(operations: Operations, machine: Machine) -> dict[str, float]:
    """Return the time of the operations of a pass by cause."""
    return {
        PRODUCTS: sum(number * time_product(product, machine) for product, number in operations.products.items()),
        ATTENTION: sum(number * time_attention(call, machine) for call, number in operations.attention.items()),
        MEMORY_BOUND: time_activations(operations.activation_bytes, machine),
    }


def time_product(product: MatrixProduct, machine: Machine) -> float:
    """Return the time of a matrix product: that of computing it, or of its memory traffic, whichever is longer."""
    m, n, k, batch, dtype = product
    speed = machine.product_speed(dtype)
    for size in (m, n, k):
        speed *= size / (size + _HALF_SPEED)
    moved = batch * (m * k + k * n + m * n) * _BYTES.get(dtype, 2)
    return max(2 * batch * m * n * k / speed, moved / machine.memory_speed)


def time_attention(call: AttentionCall, machine: Machine) -> float:
    """Return the time of an attention kernel; kernels skip what a mask excludes, usually half."""
    widths = 3 * call.query_width + 2 * call.value_width if call.backward else call.query_width + call.value_width
    flops = 2 * call.heads * call.queries * call.keys * widths / (2 if call.causal else 1)
    return flops / (machine.bf16_flops * machine.attention_efficiency)


def _add_parts(parts: dict[str, float], others: Mapping[str, float]) -> None:
    for cause, seconds in others.items():
        parts[cause] = parts.get(cause, 0.0) + seconds


def _communication(group: str) -> str:
    return f"{group} communication"


def compute_length(
    layout: Layout,
    *,
    forward: Sequence[Sequence[float]],
    backward: Sequence[Sequence[float]],
    microbatches: int,
    group_size: int | None,
) -> float:
    """Return the time of Megatron's schedule, from the times of passes by pipeline rank and chunk.

    When the pipeline is full, each round of microbatches takes the same time: two short schedules tell it.
    """

    def compute(count: int) -> float:
        return _simulate(layout, forward, backward, count, group_size).length

    if layout.pp == 1:
        return microbatches * (sum(forward[0]) + sum(backward[0]))
    round_size = group_size or layout.pp
    short = 3 * round_size + microbatches % round_size
    if microbatches <= short + round_size:
        return compute(microbatches)
    first, second = compute(short), compute(short + round_size)
    return first + (second - first) * (microbatches - short) / round_size


def _simulate(
    layout: Layout,
    forward: Sequence[Sequence[float]],
    backward: Sequence[Sequence[float]],
    microbatches: int,
    group_size: int | None,
) -> Timeline:
    orders = [list_passes(layout, rank, microbatches, group_size=group_size) for rank in range(layout.pp)]
    return simulate(orders, forward=forward, backward=backward)
