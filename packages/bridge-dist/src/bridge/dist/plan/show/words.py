"""Text that the terminal and the page share: the names of the kinds of memory, and the summary of a plan."""

from __future__ import annotations

from typing import NamedTuple

from bridge.dist.formatting import format_gib
from bridge.dist.layout import Layout
from bridge.dist.plan.forecast.timeline import Timeline
from bridge.dist.plan.results import NOT_COVERED, Plan, StagePlan


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
    return [kind for kind in KINDS if kind.field != "unsharded_bytes" or any(map(kind.of, plan.stages))]


def describe_plan(plan: Plan, timeline: Timeline) -> dict[str, str]:
    """Summarize the whole job and the limits of its numbers, one statement per subject."""
    optimizer = ", with the distributed optimizer" if plan.distributed_optimizer else ""
    statements = {
        "layout": f"{plan.world_size:,} rank(s): {Layout(**plan.layout)}; wrapped with {plan.wrap}{optimizer}",
        "batch": (
            f"{plan.global_batch_size:,} samples of {plan.seq_length:,} tokens per step, "
            f"in {plan.microbatches:,} microbatch(es) of {plan.micro_batch_size:,} on each data-parallel rank"
        ),
        "parameters": f"{plan.parameters:,}" + (f", and {plan.buffers:,} in buffers" if plan.buffers else ""),
        "memory": _describe_memory(plan),
        "computation": (
            f"{format_teraflops(max(stage.flops for stage in plan.stages))} TFLOPs per step on the busiest rank, "
            f"{plan.imbalance:.3f} times the mean over the stages"
        ),
    }
    if len(plan.stages) > 1:
        statements["bubbles"] = (
            f"ranks are idle {timeline.bubble:.1%} of the time; this estimate assumes that the time of a pass is "
            f"proportional to its FLOPs and that communication takes none"
        )
    statements["measured"] = f"activations and FLOPs with the layers of {plan.layers}; all else in the real model"
    if len(list_used_kinds(plan)) == len(KINDS):
        statements["unsharded"] = (
            "peak of unsharded weights and gradients and of the buffers for gathering and reducing; it may not "
            "coincide with the peak of activations, so the total is an upper bound"
        )
    return statements | {"not covered": "; ".join(NOT_COVERED)}


def format_teraflops(flops: int) -> str:
    """Format FLOPs as TFLOPs: three decimals from 1 on, three significant digits below."""
    tera = flops / 1e12
    return f"{tera:,.3f}" if tera >= 1 else f"{tera:.3g}"


def _describe_memory(plan: Plan) -> str:
    worst = plan.worst
    summary = f"stage {worst.pp} (first rank {worst.rank:,}) needs the most: {format_gib(worst.total_bytes)}"
    if plan.gpu_memory is None:
        return f"{summary} GiB"
    summary += f" of {format_gib(plan.gpu_memory)} GiB"
    left = plan.gpu_memory - worst.total_bytes
    if left >= 0:
        return f"{summary}: fits, {format_gib(left)} GiB are left for memory that is not covered"
    over = sum(stage.total_bytes > plan.gpu_memory for stage in plan.stages)
    return (
        f"{summary}: does not fit, {format_gib(-left)} GiB too much; {over} of {len(plan.stages)} stage(s) do not fit"
    )
