"""Published training runs, their plans, and estimates of their step time.

Importing the package imports torch and Megatron, which plans need. Runs are planned with Transformer Engine's layers,
so the process must be prepared before, see ``bridge.dist.plan.layers.prepare_process``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import yaml

from bridge.config import Document
from bridge.dist.document_layout import apply_layout
from bridge.dist.plan.plan import make_plan_options, plan
from bridge.dist.plan.request import PlanRequest
from bridge.dist.plan.results import AttentionCall, ChunkPlan, MatrixProduct, Operations, PassCost, Plan, Traffic
from bridge.dist.wrapper import Wrapper

FOLDER = Path(__file__).parent
_FP8 = ("transformer.fp8=hybrid", "transformer.fp8_recipe=tensorwise")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published run, see ``runs.yaml``."""

    name: str
    source: str
    machine: str
    model: str
    precision: str
    published: dict[str, float]
    gpus: int
    overrides: list[str] = field(default_factory=list)
    tp: int | None = None
    pp: int | None = None
    vp: int | None = None
    cp: int | None = None
    ep: int | None = None
    etp: int | None = None
    wrap: str = "ddp"
    micro_batch_size: int = 1
    global_batch_size: int
    seq_length: int | None = None
    overlapped: list[str] = field(default_factory=list)
    cuda_graphs: bool = False
    guessed: list[str] = field(default_factory=list)
    unfused_attention: bool = False
    recompute_attention: bool = False
    reduce_in_bf16: bool = False
    sent_once: float = 1.0
    trainer: str = "megatron-core"

    @property
    def key(self) -> str:
        """A name that no other run has."""
        return f"{self.name}, {self.machine} {self.precision}, {self.source}"

    @property
    def experts(self) -> bool:
        """Whether the model has experts, by its name."""
        return self.model.startswith(("deepseek", "gpt-oss", "grok", "qwen3-235b", "qwen3-30b"))

    @property
    def kind(self) -> str:
        """The kind of run, such as ``dense bf16``."""
        return f"{'MoE' if self.experts else 'dense'} {self.precision}"

    def step_seconds(self, planned: Plan) -> float:
        """Return the published time of a step."""
        ((unit, value),) = self.published.items()
        if unit == "step_seconds":
            return value
        if unit == "tokens_per_second_per_gpu":
            return planned.global_batch_size * planned.seq_length / (value * self.gpus)
        return planned.model_flops / (value * 1e12 * self.gpus)


def load_runs() -> list[Run]:
    """Return all published runs."""
    return [Run(**run) for run in yaml.safe_load((FOLDER / "runs.yaml").read_text(encoding="utf-8"))]


def plan_run(run: Run) -> Plan:
    """Plan a run, and change its operations to what the plan's layers do not show."""
    source = str(FOLDER / run.model) if run.model.endswith(".yaml") else run.model
    document = Document.load(source, [*run.overrides, *(_FP8 if run.precision == "fp8" else ())])
    values = {one.name: getattr(run, one.name) for one in fields(PlanRequest) if hasattr(run, one.name)}
    request = PlanRequest(**values, wrapper=Wrapper(run.wrap), distributed_optimizer=run.wrap == "ddp")
    apply_layout(document, request.sizes)
    planned = replace(
        plan(document, make_plan_options(document, request)),
        overlapped=run.overlapped,
        has_cuda_graphs=run.cuda_graphs,
    )
    if run.unfused_attention:
        planned = _map_passes(planned, lambda cost, forward: _unfuse(cost, forward=forward, run=run))
    if run.sent_once != 1:
        planned = _map_passes(planned, lambda cost, _: _send_once(cost, run.sent_once))
    if run.reduce_in_bf16:
        stages = [replace(stage, traffic=[_halve(one) for one in stage.traffic]) for stage in planned.stages]
        planned = replace(planned, stages=stages)
    return planned


def _send_once(cost: PassCost, share: float) -> PassCost:
    """Reduce what experts exchange to a share."""
    traffic = [
        replace(one, bytes=int(one.bytes * share)) if one.operation.startswith("alltoall") else one
        for one in cost.traffic
    ]
    return PassCost(cost.operations, traffic)


def _halve(traffic: Traffic) -> Traffic:
    """Return the traffic of reducing gradients in bf16 instead of fp32."""
    is_reduction = traffic.group in ("dp", "dp_cp", "expt_dp") and traffic.operation == "reduce_scatter"
    return replace(traffic, bytes=traffic.bytes // 2) if is_reduction else traffic


def _map_passes(planned: Plan, change: Callable[[PassCost, bool], PassCost]) -> Plan:
    changed: dict[int, PassCost] = {}  # equal chunks share their operations, and have equal traffic

    def once(cost: PassCost, forward: bool) -> PassCost:
        key = id(cost.operations)
        if key not in changed:
            changed[key] = change(cost, forward)
        return changed[key]

    def map_chunk(chunk: ChunkPlan) -> ChunkPlan:
        return replace(chunk, forward=once(chunk.forward, True), backward=once(chunk.backward, False))

    return replace(
        planned, stages=[replace(one, chunks=[map_chunk(chunk) for chunk in one.chunks]) for one in planned.stages]
    )


def _unfuse(cost: PassCost, *, forward: bool, run: Run) -> PassCost:
    """Replace attention calls by the matrix products of scores and values."""
    operations = cost.operations
    products, elements = dict(operations.products), 0

    def add(call: AttentionCall, times: int, *, backward: bool) -> int:
        queries, keys, width = call.queries, call.keys, call.query_width
        shapes = [(queries, keys, width), (queries, width, keys)]
        if backward:
            shapes = [(queries, keys, width), (keys, width, queries), (queries, width, keys), (keys, width, queries)]
        for m, n, k in shapes:
            product = MatrixProduct(m, n, k, call.heads, "bfloat16")
            products[product] = products.get(product, 0) + times
        # Each product reads or writes a matrix of scores or of their gradients.
        return len(shapes) * call.heads * queries * keys * times

    for call, times in operations.attention.items():
        elements += add(call, times, backward=call.backward)
        if call.backward and run.recompute_attention:
            elements += add(call, times, backward=False)
    return PassCost(Operations(products, {}, operations.activation_bytes + 2 * elements), cost.traffic)
