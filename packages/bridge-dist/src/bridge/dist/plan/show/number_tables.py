"""Tables of the exact numbers of a plan, to copy."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from bridge.dist.formatting import format_layer_ranges
from bridge.dist.plan.forecast.timeline import Timeline
from bridge.dist.plan.results import Plan
from bridge.dist.plan.show.elements import make_table, node


def make_numbers_section(plan: Plan, timeline: Timeline) -> Element:
    """Make the tables of stages, chunks, traffic and the layout."""
    return node(
        "section",
        node("h2", "Numbers"),
        node("p", "For one rank of each stage, in bytes and FLOPs per step. Copied numbers have no digit groups."),
        *make_table("stages", "Stages", _make_stage_rows(plan, timeline), is_open=True),
        *make_table("chunks", "Chunks, per microbatch", _make_chunk_rows(plan)),
        *make_table("traffic", "Traffic per step", _make_traffic_rows(plan)),
        *make_table("layout", "Layout", [{"axis": axis, "size": size} for axis, size in plan.layout.items()]),
        id="numbers",
    )


def _make_stage_rows(plan: Plan, timeline: Timeline) -> list[dict[str, str | int]]:
    return [
        {
            "stage": stage.pp,
            "rank": stage.rank,
            "parameters": stage.parameters,
            "weights": stage.weight_bytes,
            "gradients": stage.gradient_bytes,
            "master weights": stage.master_bytes,
            "optimizer state": stage.state_bytes,
            "activations": stage.activation_bytes,
            "unsharded": stage.unsharded_bytes,
            "total": stage.total_bytes,
            "buckets": len(stage.buckets),
            "FLOPs": stage.flops,
            "idle": f"{bubble:.1%}",
        }
        for stage, bubble in zip(plan.stages, timeline.bubbles, strict=True)
    ]


def _make_chunk_rows(plan: Plan) -> list[dict[str, str | int]]:
    return [
        {
            "stage": stage.pp,
            "chunk": chunk.vp_stage,
            "layers": format_layer_ranges(chunk.layers),
            "parameters": chunk.parameters,
            "activations": chunk.activation_bytes,
            "forward FLOPs": chunk.forward_flops,
            "FLOPs": chunk.flops,
        }
        for stage in plan.stages
        for chunk in stage.chunks
    ]


def _make_traffic_rows(plan: Plan) -> list[dict[str, str | int]]:
    return [
        {
            "stage": stage.pp,
            "group": traffic.group,
            "ranks": traffic.ranks,
            "operation": traffic.operation,
            "calls": traffic.calls,
            "bytes": traffic.bytes,
        }
        for stage in plan.stages
        for traffic in stage.traffic
    ]
