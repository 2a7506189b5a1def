"""A plan in words: what holds of the whole job, and the kinds of memory, as terminal and page name them."""

from __future__ import annotations

from typing import NamedTuple

from bridge.dist.format import format_gib
from bridge.dist.layout import Layout
from bridge.dist.plan.forecast.timeline import Timeline
from bridge.dist.plan.results import NOT_COVERED, Plan, StagePlan


class Kind(NamedTuple):
    """What memory is for: its name, and the field of a stage that has its bytes."""

    name: str
    field: str

    def of(self, stage: StagePlan) -> int:
        """Return its bytes on a rank of a stage."""
        size: int = getattr(stage, self.field)
        return size


KINDS = (
    Kind("weights", "weight_bytes"),
    Kind("gradients", "gradient_bytes"),
    Kind("optimizer", "optimizer_bytes"),
    Kind("activations", "activation_bytes"),
    Kind("unsharded", "unsharded_bytes"),
)
"""The kinds of memory, in the order in which they are stacked."""


def used_kinds(plan: Plan) -> list[Kind]:
    """Return the kinds of memory that a plan shows: without what a wrapper makes whole, if it makes nothing whole."""
    return [kind for kind in KINDS if kind.field != "unsharded_bytes" or any(map(kind.of, plan.stages))]


def describe_plan(plan: Plan, timeline: Timeline) -> dict[str, str]:
    """Say in words what holds of the whole job, by subject, and what its numbers are worth."""
    optimizer = ", with the distributed optimizer" if plan.distributed_optimizer else ""
    found = {
        "layout": f"{plan.world_size:,} rank(s): {Layout(**plan.layout)}; wrapped with {plan.wrap}{optimizer}",
        "batch": (
            f"{plan.global_batch_size:,} samples of {plan.seq_length:,} tokens a step, "
            f"{plan.micro_batch_size:,} at a time: {plan.microbatches:,} microbatch(es)"
        ),
        "parameters": f"{plan.parameters:,}" + (f", and {plan.buffers:,} in buffers" if plan.buffers else ""),
        "memory": _describe_memory(plan),
        "computation": (
            f"{format_teraflops(max(stage.flops for stage in plan.stages))} TFLOPs a step on the busiest rank, "
            f"{plan.imbalance:.3f} times the mean of the stages"
        ),
    }
    if len(plan.stages) > 1:
        found["bubbles"] = (
            f"{timeline.bubble:.1%} of the ranks' time is spent waiting: an estimate, as if passes took time in "
            f"proportion to their FLOPs, and sending none"
        )
    found["measured"] = f"activations and FLOPs on the layers of {plan.layers}; all else counted in the real model"
    if len(used_kinds(plan)) == len(KINDS):
        found["unsharded"] = (
            "whole weights and gradients, and what is gathered and reduced, at their peak: added to that of the "
            "activations, which may be at another moment, so that the total is at most that"
        )
    return found | {"not covered": "; ".join(NOT_COVERED)}


def format_teraflops(flops: int) -> str:
    """Write FLOPs as TFLOPs with three decimals, or digits where they are few."""
    tera = flops / 1e12
    return f"{tera:,.3f}" if tera >= 1 else f"{tera:.3g}"


def _describe_memory(plan: Plan) -> str:
    worst = plan.worst
    held = f"stage {worst.pp} (rank {worst.rank:,} and those beside it) holds most: {format_gib(worst.total_bytes)}"
    if plan.gpu_memory is None:
        return f"{held} GiB"
    held += f" of {format_gib(plan.gpu_memory)} GiB"
    left = plan.gpu_memory - worst.total_bytes
    if left >= 0:
        return f"{held}: fits, {format_gib(left)} GiB are left for what is not covered"
    over = sum(stage.total_bytes > plan.gpu_memory for stage in plan.stages)
    return (
        f"{held}: does not fit, {format_gib(-left)} GiB too much; "
        f"in all {over} of {len(plan.stages)} stage(s) do not fit"
    )
