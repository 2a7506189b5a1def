"""Text that the terminal and the page share: the names of the kinds of memory, and the summary of a plan."""

from __future__ import annotations

from typing import NamedTuple

from bridge.dist.formatting import format_gib, format_seconds
from bridge.dist.layout import Layout
from bridge.dist.plan.forecast.step_time import make_timeline
from bridge.dist.plan.results import NOT_COVERED, RESERVED, Plan, StagePlan, StepTime, Traffic


class Kind(NamedTuple):
    """A kind of memory: its name, and the field of ``StagePlan`` that holds its bytes."""

    name: str
    field: str

    def of(self, stage: StagePlan) -> int:
        """Return the bytes of this kind on a rank of a stage."""
        size: int = getattr(stage, self.field)
        return size


KINDS = (
    Kind("weights", "weight_bytes"),
    Kind("gradients", "gradient_bytes"),
    Kind("optimizer", "optimizer_bytes"),
    Kind("activations", "activation_bytes"),
    Kind("unsharded", "unsharded_bytes"),
)
"""All kinds of memory, in the order of the stacked bars."""


def list_used_kinds(plan: Plan) -> list[Kind]:
    """Return the kinds of memory to show for a plan; unsharded memory only if a stage has some."""
    return [kind for kind in KINDS if kind.field != "unsharded_bytes" or has_unsharded(plan)]


def has_unsharded(plan: Plan) -> bool:
    """Return whether a stage has unsharded memory."""
    return any(stage.unsharded_bytes for stage in plan.stages)


def list_largest_traffic(plan: Plan) -> list[tuple[Traffic, StagePlan]]:
    """Return each operation of each group on the stage where it moves the most bytes, the largest first."""
    most: dict[tuple[str, int, str], tuple[Traffic, StagePlan]] = {}
    for stage in plan.stages:
        for traffic in stage.traffic:
            key = (traffic.group, traffic.ranks, traffic.operation)
            if key not in most or traffic.bytes > most[key][0].bytes:
                most[key] = (traffic, stage)
    return sorted(most.values(), key=lambda one: -one[0].bytes)


def describe_plan(plan: Plan) -> dict[str, str]:
    """Summarize the whole job and the limits of its numbers, one statement per subject."""
    sharded = f" {plan.sharding_strategy}" if plan.sharding_strategy else ""
    sharded += ", with the distributed optimizer" if plan.distributed_optimizer else ""
    statements = {
        "layout": f"{plan.world_size:,} rank(s): {Layout(**plan.layout)}; wrapped with {plan.wrap}{sharded}",
        "batch": (
            f"{plan.global_batch_size:,} samples of {plan.seq_length:,} tokens per step, "
            f"in {plan.microbatches:,} microbatch(es) of {plan.micro_batch_size:,} on each data-parallel rank"
        ),
        "parameters": f"{plan.parameters:,}" + (f", and {plan.buffers:,} in buffers" if plan.buffers else ""),
        "memory": _describe_memory(plan),
        "reserve": f"{format_gib(plan.reserve_bytes)} GiB per GPU, an estimate for {RESERVED}; --reserve sets it",
        "computation": (
            f"{format_teraflops(max(stage.flops for stage in plan.stages))} TFLOPs per step on the busiest rank, "
            f"{plan.imbalance:.3f} times the mean over the stages"
        ),
    }
    if len(plan.stages) > 1:
        statements["bubbles"] = _describe_bubbles(plan)
    statements["layers"] = _describe_layers(plan)
    if has_unsharded(plan):
        statements["unsharded"] = (
            "peak of unsharded weights and gradients and of the buffers for gathering and reducing; it may not "
            "coincide with the peak of activations, so the total is an upper bound"
        )
    return statements | {"not covered": "; ".join(NOT_COVERED)}


def describe_time(time: StepTime | None) -> dict[str, str]:
    """Summarize the estimated time of a step, and of training if that was asked for."""
    if time is None:
        return {}
    words = {
        "time": (
            f"{format_seconds(time.step_seconds)} per step on {time.machine} ({time.validated}): "
            f"{time.tokens_per_second_per_gpu:,.0f} tokens/s per GPU, "
            f"{time.model_flops_utilization:.1%} model-FLOPs utilisation"
        )
    }
    training = time.training
    if training is None:
        return words
    takes = f"{training.tokens:,} tokens take {training.days:,.1f} days and {training.gpu_hours:,.0f} GPU-hours"
    if training.cost is not None:
        takes += f", which cost {training.cost:,.0f} in the currency of --price"
    return words | {"training": takes}


def list_idle_shares(plan: Plan) -> list[float]:
    """Return the share of the step in which a rank of each stage waits for other stages.

    It follows from the estimated time; in a plan without one, the time of a pass is its number of FLOPs.
    """
    if plan.time is None:
        return make_timeline(plan, None).bubbles
    return [seconds / plan.time.step_seconds for seconds in plan.time.idle_seconds]


def format_teraflops(flops: int) -> str:
    """Format FLOPs as TFLOPs: three decimals from 1 on, three significant digits below."""
    tera = flops / 1e12
    return f"{tera:,.3f}" if tera >= 1 else f"{tera:.3g}"


def _describe_bubbles(plan: Plan) -> str:
    shares = list_idle_shares(plan)
    idle = f"stages wait for others {sum(shares) / len(shares):.1%} of the step on average"
    if plan.time is None:
        return f"{idle}, if the time of a pass is proportional to its FLOPs and communication takes none"
    busiest = plan.time.stage
    return f"{idle}, and {shares[busiest]:.1%} on stage {busiest}, the busiest, by the estimated times of its passes"


def _describe_layers(plan: Plan) -> str:
    if plan.layers != "transformer_engine":
        return "PyTorch's, counted in the real model"
    fusions = f"; chosen: {', '.join(plan.fusions)}" if plan.fusions else ""
    left_out = f"; left out, so that all activations count: {', '.join(plan.left_out)}" if plan.left_out else ""
    return f"Transformer Engine 2.17 modelled, not measured; all else is counted in the real model{fusions}{left_out}"


def _describe_memory(plan: Plan) -> str:
    worst = plan.worst
    summary = f"stage {worst.pp} (first rank {worst.rank:,}) needs the most: {format_gib(worst.total_bytes)}"
    if plan.reserve_bytes:
        summary += f" and the reserve of {format_gib(plan.reserve_bytes)}"
    if plan.gpu_memory is None:
        return f"{summary} GiB"
    summary += f" of {format_gib(plan.gpu_memory)} GiB"
    left = plan.gpu_memory - plan.reserve_bytes - worst.total_bytes
    if left >= 0:
        return f"{summary}: fits, {format_gib(left)} GiB are left for memory that is not covered"
    over = sum(map(plan.exceeds_memory, plan.stages))
    return (
        f"{summary}: does not fit, {format_gib(-left)} GiB too much; {over} of {len(plan.stages)} stage(s) do not fit"
    )
