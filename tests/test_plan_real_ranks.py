"""Plans equal the measurements of real processes, on every rank, for models of every family."""

from __future__ import annotations

import pytest
from measured_ranks import (
    BATCH,
    WORLD,
    Case,
    Measured,
    MeasuredSharded,
    measure_ranks,
    pop_recorded_parameters,
    train_sharded,
)
from planned_jobs import HALF, RECOMPUTED
from ranks import run_ranks

from bridge.config import ModelConfig
from bridge.dist.plan.count.rank import measure_rank
from bridge.dist.wrapper import ShardingStrategy, Wrapper

CASES = {
    "dp": Case(preset="tiny", distributed_optimizer=True),
    "tp pp": Case(preset="tiny", sizes={"tp": 2, "pp": 2}),
    # Layer norm saves its statistics in half precision on a CPU, in full precision on a GPU.
    "pp vp, half": Case(
        preset="tiny", sizes={"pp": 2, "vp": 2}, distributed_optimizer=True, overrides=HALF, keeps_alike=False
    ),
    "pp vp": Case(preset="tiny", sizes={"pp": 2, "vp": 2}, distributed_optimizer=True),
    "tp sp": Case(preset="tiny", sizes={"tp": 2}, sequence_parallel=True),
    "tp sp, recomputed": Case(preset="tiny", sizes={"tp": 2}, sequence_parallel=True, overrides=RECOMPUTED),
    "pp, recomputed": Case(preset="tiny", sizes={"pp": 2}, overrides=RECOMPUTED),
    "pp, feed-forward layers recomputed": Case(
        preset="tiny",
        sizes={"pp": 2},
        overrides=(
            "transformer.add_bias_linear=false",
            "transformer.recompute_granularity=selective",
            "transformer.recompute_modules=[mlp]",
        ),
    ),
    "cp, rotary, grouped queries": Case(
        preset="tiny",
        sizes={"cp": 2},
        overrides=("position_embedding_type=rope", "transformer.num_query_groups=2"),
        distributed_optimizer=True,
    ),
    # On a CPU, torch has no fused attention if values and queries differ in width, or if a bias needs a gradient.
    "latent attention": Case(
        preset="mla-tiny", sizes={"tp": 2}, sequence_parallel=True, distributed_optimizer=True, keeps_alike=False
    ),
    "encoder and decoder": Case(preset="t5-tiny", sizes={"tp": 2}, distributed_optimizer=True, keeps_alike=False),
    "encoder and decoder, rotary": Case(
        preset="t5-tiny", sizes={"tp": 2}, overrides=("position_embedding_type=rope",), distributed_optimizer=True
    ),
    "experts": Case(
        preset="moe-tiny",
        sizes={"tp": 2, "ep": 2},
        sequence_parallel=True,
        distributed_optimizer=True,
        overrides=HALF,
        keeps_alike=False,
    ),
    "mamba, half": Case(preset="mamba-tiny", sizes={"tp": 2, "pp": 2}, overrides=HALF),
    "no wrapper": Case(preset="tiny", sizes={"tp": 2}, wrapper=Wrapper.NONE),
}


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Measured]]:
    return run_ranks(measure_ranks, WORLD, CASES, timeout=240)


@pytest.mark.parametrize("name", CASES)
def test_the_plan_of_every_rank_matches_its_measurements(name: str, measured: list[dict[str, Measured]]) -> None:
    case = CASES[name]
    job = case.job()
    layout = job.check(ModelConfig.from_dict(job.document), WORLD)
    for rank in range(WORLD):
        planned = measure_rank(job, layout, BATCH, rank=rank, memo={})
        assert (
            Measured(
                parameters=pop_recorded_parameters(),
                weights=planned.weights,
                gradients=planned.gradients,
                master=planned.master,
                state=planned.state,
                buckets=planned.buckets,
                kept=None
                if not case.keeps_alike
                else [chunk.work.kept + chunk.work.shared for chunk in planned.chunks],
                recomputed=[
                    chunk.work.temporary for chunk in planned.chunks if case.recomputes and chunk.work.passed_on
                ],
            )
            == measured[rank][name]
        )


SHARDED = {
    f"{wrapper}, {name}": Case(
        preset=preset, sizes=sizes, sequence_parallel="tp" in sizes, overrides=overrides, wrapper=wrapper
    )
    for wrapper, preset, name, sizes, overrides in (
        (Wrapper.MEGATRON_FSDP, "tiny", "dp, half", {}, HALF),
        (Wrapper.MEGATRON_FSDP, "tiny", "tp, recomputed", {"tp": 2}, RECOMPUTED),
        (Wrapper.MEGATRON_FSDP, "moe-tiny", "experts", {"ep": 2}, ()),
        (Wrapper.MEGATRON_FSDP, "moe-tiny", "experts, half", {"ep": 2}, HALF),
        (Wrapper.TORCH_FSDP2, "tiny", "dp, half", {}, HALF),
        (Wrapper.TORCH_FSDP2, "tiny", "tp, recomputed", {"tp": 2}, RECOMPUTED),
        (Wrapper.TORCH_FSDP2, "tiny", "pp vp", {"pp": 2, "vp": 2}, ()),
        (Wrapper.TORCH_FSDP2, "moe-tiny", "experts", {}, HALF),
    )
}
SHARDED |= {
    f"{strategy}, {name}": Case(
        preset=preset, sizes=sizes, overrides=overrides, wrapper=Wrapper.MEGATRON_FSDP, sharding_strategy=strategy
    )
    for strategy, preset, name, sizes, overrides in (
        (ShardingStrategy.NO_SHARD, "tiny", "dp, half", {}, HALF),
        (ShardingStrategy.OPTIM, "tiny", "dp", {}, ()),
        (ShardingStrategy.OPTIM, "moe-tiny", "experts, half", {"ep": 2}, HALF),
        (ShardingStrategy.OPTIM_GRADS, "tiny", "tp, half", {"tp": 2}, HALF),
    )
}


@pytest.fixture(scope="module")
def measured_sharded() -> list[dict[str, MeasuredSharded]]:
    return run_ranks(train_sharded, WORLD, SHARDED, timeout=240)


@pytest.mark.parametrize("name", SHARDED)
def test_the_plan_of_every_sharded_rank_matches_its_measurements(
    name: str, measured_sharded: list[dict[str, MeasuredSharded]]
) -> None:
    job = SHARDED[name].job()
    layout = job.check(ModelConfig.from_dict(job.document), WORLD)
    for rank in (0, WORLD - 1):  # the first and the last rank of every group
        planned = measure_rank(job, layout, BATCH, rank=rank, memo={})
        calls = planned.traffic.count(BATCH.count_microbatches(layout))
        assert (
            MeasuredSharded(
                parameters=pop_recorded_parameters(),
                weights=planned.weights,
                gradients=planned.gradients,
                master=planned.master,
                state=planned.state,
                whole=planned.unsharded,
                collectives={
                    (group, operation): (calls.number[group, ranks, operation], size)
                    for (group, ranks, operation), size in calls.size.items()
                    if group in ("dp_cp", "expt_dp")
                    and (operation != "allreduce" or job.sharding_strategy is ShardingStrategy.NO_SHARD)
                },
            )
            == measured_sharded[rank][name]
        )
