"""Rows of the tables with the exact numbers of a plan."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.dist.formatting import format_layer_ranges
from bridge.dist.plan.results import Plan, StepTime
from bridge.dist.plan.show.words import has_unsharded, list_idle_shares

Row = dict[str, str | int]


def make_tables(plan: Plan) -> Iterator[tuple[str, str, list[Row]]]:
    """Yield the name, caption and rows of each table: stages, chunks, traffic, matrix products and the layout."""
    yield "stages", "Stages", _make_stage_rows(plan)
    yield "chunks", "Chunks, per microbatch", _make_chunk_rows(plan)
    yield "traffic", "Traffic per step", _make_traffic_rows(plan)
    if plan.time is not None:
        yield "products", f"Matrix products of stage {plan.time.stage} by shape", _make_product_rows(plan.time)
    yield "layout", "Layout", [{"axis": axis, "size": size} for axis, size in plan.layout.items()]


def _make_stage_rows(plan: Plan) -> list[Row]:
    return [
        {
            "stage": stage.pp,
            "rank": stage.rank,
            "parameters": stage.parameters,
            "total": stage.total_bytes,
            "weights": stage.weight_bytes,
            "gradients": stage.gradient_bytes,
            "master weights": stage.master_bytes,
            "optimizer state": stage.state_bytes,
            "activations": stage.activation_bytes,
            **({"unsharded": stage.unsharded_bytes} if has_unsharded(plan) else {}),
            "buckets": len(stage.buckets),
            "FLOPs": stage.flops,
            "idle": f"{idle:.1%}",
        }
        for stage, idle in zip(plan.stages, list_idle_shares(plan), strict=True)
    ]


def _make_chunk_rows(plan: Plan) -> list[Row]:
    return [
        {
            "stage": stage.pp,
            "chunk": chunk.vp_stage,
            "layers": format_layer_ranges(chunk.layers),
            "parameters": chunk.parameters,
            "activations": chunk.activation_bytes,
            "temporary": chunk.temporary_bytes,
            "forward FLOPs": chunk.forward_flops,
            "weight-gradient FLOPs": chunk.weight_gradient_flops,
            "FLOPs": chunk.flops,
        }
        for stage in plan.stages
        for chunk in stage.chunks
    ]


def _make_product_rows(time: StepTime) -> list[Row]:
    return [{**one.product._asdict(), "calls": one.calls, "seconds": f"{one.seconds:.4g}"} for one in time.products]


def _make_traffic_rows(plan: Plan) -> list[Row]:
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
