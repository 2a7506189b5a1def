"""Plans made by hand, and the rendering of a plan on the terminal."""

import io
from dataclasses import replace
from typing import Any

from rich.console import Console

from bridge.dist.plan.results import ChunkPlan, MatrixProduct, Operations, PassCost, Plan, StagePlan, Traffic
from bridge.dist.plan.show.terminal import render_plan

GIB = 2**30
KINDS = ("weights", "gradients", "optimizer", "activations")


def make_stage(
    pp: int, gib: tuple[int, int, int, int], *, chunks: int = 1, flops: int = 3 * 10**12, traffic: int = GIB
) -> StagePlan:
    """Return a stage with these GiB of weights, gradients, optimizer (a third of it master weights) and activations."""
    weights, gradients, optimizer, activations = (size * GIB for size in gib)
    return StagePlan(
        pp=pp,
        rank=8 * pp,
        parameters=1_234_567_890,
        weight_bytes=weights + 1,  # avoids round numbers of bytes
        gradient_bytes=gradients,
        master_bytes=optimizer // 3,
        state_bytes=optimizer - optimizer // 3,
        optimizer_bytes=optimizer,
        activation_bytes=activations,
        unsharded_bytes=0,
        total_bytes=weights + 1 + gradients + optimizer + activations,
        flops=8 * chunks * flops,
        buckets=[40_000_000, 12_345_678],
        chunks=[
            ChunkPlan(
                vp_stage=chunk,
                layers=[4 * chunk + pp],
                parameters=1_234_567_890 // chunks,
                activation_bytes=GIB,
                temporary_bytes=0,
                forward_flops=flops // 3,
                flops=flops,
                weight_gradient_flops=flops // 3,
                forward=_make_pass_cost(flops // 3),
                backward=_make_pass_cost(flops - flops // 3),
                received_bytes=2**24,
                sent_bytes=2**24,
            )
            for chunk in range(chunks)
        ],
        traffic=[Traffic(group="tp", ranks=8, operation="allgather", calls=12, bytes=traffic)],
    )


def _make_pass_cost(flops: int) -> PassCost:
    product = MatrixProduct(m=8192, n=8192, k=flops // (2 * 8192 * 8192), batch=1, dtype="bfloat16")
    return PassCost(Operations({product: 1}, {}, activation_bytes=2**28), traffic=[])


def make_plan(stages: list[StagePlan], *, gpu_memory: int | None = 80 * GIB, **changes: Any) -> Plan:
    vp = len(stages[0].chunks)
    plan = Plan(
        world_size=8 * len(stages),
        layout={"tp": 8, "pp": len(stages), "vp": vp, "cp": 1, "ep": 1, "etp": 8, "dp": 1},
        wrap="ddp",
        distributed_optimizer=True,
        sharding_strategy=None,
        layers="pytorch",
        fusions=[],
        left_out=[],
        seq_length=8192,
        micro_batch_size=1,
        global_batch_size=8,
        microbatches=8,
        microbatch_group_size=None,
        parameters=98_765_432_100,
        buffers=14_848,
        gpu_memory=gpu_memory,
        reserve_bytes=0,
        model_flops=10**15,
        has_experts=False,
        overlapped=[],
        stages=stages,
        seconds=2.5,
    )
    return replace(plan, **changes)


SMALL = make_plan([make_stage(0, (10, 20, 10, 36), traffic=2 * GIB), make_stage(1, (10, 20, 10, 20), traffic=3 * GIB)])
LARGE = make_plan(
    [
        make_stage(0, (10, 20, 12, 48)),
        *(make_stage(pp, (10, 20, 12, 18)) for pp in range(1, 15)),
        make_stage(15, (10, 20, 12, 28)),
    ]
)
DEEP = make_plan(
    [make_stage(pp, (10, 20, 10, 30 - pp), chunks=2) for pp in range(16)], microbatches=64, global_batch_size=64
)


def sizes(stage: StagePlan) -> tuple[int, int, int, int]:
    return stage.weight_bytes, stage.gradient_bytes, stage.optimizer_bytes, stage.activation_bytes


def render_on_terminal(plan: Plan, *, width: int = 80, colour: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="standard" if colour else None
    )
    for part in render_plan(plan):
        console.print(part)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def words(shown: str) -> str:
    return " ".join(shown.split())
