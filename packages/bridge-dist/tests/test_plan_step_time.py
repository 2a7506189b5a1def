"""The time of a step: its parts, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from example_plans import DEEP, SMALL, make_plan, make_stage

from bridge.dist.formatting import format_seconds
from bridge.dist.plan.forecast.machine import Machine, load_machine
from bridge.dist.plan.forecast.step_time import (
    BUBBLE,
    OPTIMIZER,
    compute_training_cost,
    estimate_time,
    make_timeline,
    time_attention,
    time_operations,
    time_product,
)
from bridge.dist.plan.results import AttentionCall, MatrixProduct, Operations, PassCost, Plan, Traffic
from bridge.dist.plan.show.words import describe_plan, describe_time, list_idle_shares
from bridge.dist.wrapper import ShardingStrategy

MACHINE = replace(
    load_machine("h100"),
    bf16_flops=1000e12,
    fp8_flops=2000e12,
    fp32_flops=500e12,
    product_efficiency=0.5,
    fp8_efficiency=0.4,
    attention_efficiency=0.25,
    memory_bandwidth=1e12,
    exposed=0.5,
    exchange_latency=1e-3,
)
SIZE = 2**14


@pytest.mark.parametrize(("dtype", "speed"), [("bfloat16", 500e12), ("float8", 800e12), ("float32", 250e12)])
def test_a_large_product_takes_its_flops_at_the_speed_of_its_data_type(dtype: str, speed: float) -> None:
    seconds = time_product(MatrixProduct(SIZE, SIZE, SIZE, 1, dtype), MACHINE)
    assert seconds == pytest.approx(2 * SIZE**3 / speed * ((SIZE + 32) / SIZE) ** 3)


def test_a_thin_product_takes_as_long_as_reading_its_matrices() -> None:
    """A row times a matrix of 2**28 elements of two bytes, at 80 % of 1 TB/s."""
    seconds = time_product(MatrixProduct(1, SIZE, SIZE, 1, "bfloat16"), replace(MACHINE, bf16_flops=1e18))
    assert seconds == pytest.approx(2 * (SIZE * SIZE + 2 * SIZE) / 0.8e12)


def test_attention_takes_half_of_its_flops_under_a_mask() -> None:
    """Four times heads, queries, keys and width forward; two and a half times as much backward."""
    call = AttentionCall(8, 1024, 1024, 64, 64, causal=False, backward=False)
    whole = 4 * 8 * 1024 * 1024 * 64 / 250e12
    assert time_attention(call, MACHINE) == pytest.approx(whole)
    assert time_attention(call._replace(causal=True), MACHINE) == pytest.approx(whole / 2)
    assert time_attention(call._replace(backward=True), MACHINE) == pytest.approx(2.5 * whole)


def test_other_kernels_pass_over_activations() -> None:
    parts = time_operations(Operations({}, {}, 8 * 10**11), MACHINE)
    assert parts["memory-bound work"] == pytest.approx(1.5)


def test_the_parts_add_up_to_the_step() -> None:
    for plan in (SMALL, DEEP):
        time = estimate_time(plan, MACHINE)
        assert sum(time.parts.values()) == pytest.approx(time.step_seconds)
        tokens = plan.global_batch_size * plan.seq_length
        assert time.tokens_per_second_per_gpu == pytest.approx(tokens / time.step_seconds / plan.world_size)
        assert time.model_flops_utilization == pytest.approx(
            plan.model_flops / (time.step_seconds * plan.world_size * 1000e12)
        )
        assert time.products[0].calls == plan.microbatches * len(plan.stages[0].chunks)
        assert time.to_json()["products"][0]["m"] == 8192


def test_the_bubble_of_equal_stages_is_that_of_the_published_formula() -> None:
    """(pp - 1) / (vp x microbatches) of the time of the passes, whatever the number of microbatches."""
    silent = replace(DEEP, stages=[replace(stage, traffic=[]) for stage in DEEP.stages])
    for microbatches in (16, 64, 1024):
        time = estimate_time(silent, MACHINE, microbatches=microbatches)
        passes = sum(seconds for cause, seconds in time.parts.items() if cause not in (BUBBLE, OPTIMIZER))
        assert time.parts[BUBBLE] == pytest.approx(passes * 15 / (2 * microbatches), rel=1e-3)


def test_schedule_and_summary_take_the_times_of_the_estimate() -> None:
    """Stage 1 computes as much as stage 0 and moves ten times the bytes: by FLOPs alone, both would wait equally."""
    slow = make_stage(1, (10, 20, 10, 20))
    [chunk] = slow.chunks
    operations = chunk.forward.operations._replace(activation_bytes=10 * 2**28)
    chunk = replace(chunk, forward=PassCost(operations, []))
    plan = make_plan([make_stage(0, (10, 20, 10, 36)), replace(slow, chunks=[chunk])])
    time = estimate_time(plan, MACHINE)
    timed, by_flops = make_timeline(plan, MACHINE), make_timeline(plan, None)
    assert [share * timed.length for share in timed.bubbles] == pytest.approx(time.idle_seconds)
    assert time.parts[BUBBLE] == time.idle_seconds[time.stage]
    assert by_flops.bubbles[0] == pytest.approx(by_flops.bubbles[1])
    assert time.idle_seconds[0] > 2 * time.idle_seconds[1]
    assert list_idle_shares(plan) == by_flops.bubbles
    assert "if the time of a pass is proportional to its FLOPs" in describe_plan(plan)["bubbles"]
    shares = list_idle_shares(replace(plan, time=time))
    assert shares == pytest.approx([seconds / time.step_seconds for seconds in time.idle_seconds])
    assert f"and {shares[1]:.1%} on stage 1, the busiest" in describe_plan(replace(plan, time=time))["bubbles"]


def test_a_long_schedule_waits_as_long_as_simulated() -> None:
    long = replace(DEEP, microbatches=400, global_batch_size=400)
    timeline = make_timeline(long, MACHINE)
    idle = [share * timeline.length for share in timeline.bubbles]
    assert estimate_time(long, MACHINE).idle_seconds == pytest.approx(idle, rel=1e-3)


def test_more_microbatches_take_longer_and_waste_less() -> None:
    few, many = (estimate_time(DEEP, MACHINE, microbatches=count) for count in (16, 160))
    assert many.step_seconds < 10 * few.step_seconds
    assert many.tokens_per_second_per_gpu > few.tokens_per_second_per_gpu
    assert estimate_time(DEEP, MACHINE) == estimate_time(DEEP, MACHINE, microbatches=DEEP.microbatches)


def _exchange(plan: Plan, *, overlapped: list[str]) -> Plan:
    """Return a plan of one stage whose forward pass gathers 450 GB over tensor-parallel ranks."""
    chunk = plan.stages[0].chunks[0]
    traffic = [Traffic(group="tp", ranks=8, operation="allgather", calls=0, bytes=450 * 10**9)]
    chunk = replace(chunk, forward=PassCost(chunk.forward.operations, traffic))
    return replace(plan, overlapped=overlapped, stages=[replace(plan.stages[0], chunks=[chunk], traffic=[])])


def test_overlapped_communication_is_partly_exposed() -> None:
    one = make_plan([make_stage(0, (10, 20, 10, 36))])
    seconds = 8 * 7 / 8 / 0.75  # in eight microbatches, seven eighths each at 75 % of 450 GB/s
    assert estimate_time(_exchange(one, overlapped=[]), MACHINE).parts["tp communication"] == pytest.approx(seconds)
    hidden = estimate_time(_exchange(one, overlapped=["tp"]), MACHINE)
    assert hidden.parts["tp communication"] == pytest.approx(seconds / 2)


@pytest.mark.parametrize(
    ("strategy", "reductions", "gathers", "exposed"),
    [
        # Half a second for each gather and reduction, while a microbatch takes an eighth of one for its backward pass.
        (ShardingStrategy.NO_SHARD, 1, 0, 0.5),
        (ShardingStrategy.OPTIM, 1, 1, 0.5 + 0.5),
        (ShardingStrategy.OPTIM_GRADS, 8, 1, 8 * (0.5 - 0.125) + 0.5),
        (ShardingStrategy.OPTIM_GRADS_PARAMS, 8, 16, 8 * (3 * 0.5 - 0.125)),
    ],
)
def test_each_strategy_of_megatron_fsdp_hides_what_runs_beside_the_passes(
    strategy: ShardingStrategy, reductions: int, gathers: int, exposed: float
) -> None:
    size = int(0.5 * 0.75 * 450e9 * 8 / 7)  # seven eighths at 75 % of 450 GB/s

    def make_traffic(operation: str, calls: int) -> Traffic:
        return Traffic(group="dp_cp", ranks=8, operation=operation, calls=calls, bytes=calls * size)

    one = make_stage(0, (10, 20, 10, 36))
    nothing = PassCost(Operations({}, {}, activation_bytes=0), [])
    # With 1 TB/s, at 80 % of it, memory-bound kernels pass over an activation one and a half times.
    busy = Operations({}, {}, activation_bytes=int(0.125 * 0.8e12 / 1.5))
    in_pass = [make_traffic("reduce_scatter", 1)] if reductions == 8 else []
    chunk = replace(one.chunks[0], parameters=0, forward=nothing, backward=PassCost(busy, in_pass))
    reduced = "allreduce" if strategy is ShardingStrategy.NO_SHARD else "reduce_scatter"
    traffic = [make_traffic(reduced, reductions), *([make_traffic("allgather", gathers)] if gathers else [])]
    layout = {"tp": 1, "pp": 1, "vp": 1, "cp": 1, "ep": 1, "etp": 1, "dp": 8}
    plan = make_plan(
        [replace(one, buckets=[], chunks=[chunk], traffic=traffic)],
        layout=layout,
        wrap="megatron-fsdp",
        distributed_optimizer=False,
        sharding_strategy=strategy,
    )
    expected = exposed * (2 if strategy is ShardingStrategy.NO_SHARD else 1)  # an all-reduce sends twice as much
    found = estimate_time(plan, MACHINE).parts["dp_cp communication"]
    assert found == pytest.approx(expected, rel=1e-3)
    assert estimate_time(plan, MACHINE, microbatches=16).parts["dp_cp communication"] == pytest.approx(
        found + (found - (0.5 if gathers == 1 else 0) if reductions == 8 else 0), rel=1e-3
    )


def test_exchanges_of_tokens_have_a_latency_without_cuda_graphs() -> None:
    """Three exchanges in each of eight microbatches; exchanges of sequences have none."""
    one = make_plan([make_stage(0, (10, 20, 10, 36))])
    chunk = one.stages[0].chunks[0]
    for group, seconds in (("ep", 24e-3), ("cp", 0.0)):
        traffic = [Traffic(group=group, ranks=8, operation="alltoall_base", calls=3, bytes=0)]
        stage = replace(one.stages[0], chunks=[replace(chunk, forward=PassCost(chunk.forward.operations, traffic))])
        plan = replace(one, stages=[replace(stage, traffic=[])])
        waits, does_not = (
            estimate_time(replace(plan, has_cuda_graphs=has), MACHINE).step_seconds for has in (False, True)
        )
        assert waits - does_not == pytest.approx(seconds)


def test_short_times_have_short_units() -> None:
    assert [format_seconds(one) for one in (1234.5, 0.25, 0.0125, 2e-5, 0.0)] == [
        "1,234.500 s",
        "0.250 s",
        "12.500 ms",
        "20.000 us",
        "0.000 s",
    ]


def test_training_costs_gpu_hours() -> None:
    time = replace(estimate_time(SMALL, MACHINE), tokens_per_second_per_gpu=1000.0)
    cost = compute_training_cost(SMALL, time, tokens=16 * 1000 * 86400 * 10, price=2.5)
    assert (cost.days, cost.gpu_hours, cost.cost) == pytest.approx((10, 16 * 240, 16 * 240 * 2.5))
    assert describe_time(replace(time, training=cost))["training"].endswith(
        "3,840 GPU-hours, which cost 9,600 in the currency of --price"
    )
    without = compute_training_cost(SMALL, time, tokens=1, price=None)
    assert without.cost is None
    assert "cost" not in describe_time(replace(time, training=without))["training"]


def test_estimates_say_how_accurate_they_are() -> None:
    assert estimate_time(SMALL, load_machine("h100")).validated.endswith("11 published runs (dense bf16), 5% at worst")
    custom: Machine = replace(load_machine("h100"), name="ours")
    assert estimate_time(SMALL, custom).validated == "not validated"
