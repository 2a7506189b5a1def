"""Plans are equal to measurements of real processes, on every rank, for models of every family."""

from __future__ import annotations

import pytest
from held_by_ranks import BATCH, LONGER, WORLD, Case, Held, HeldSharded, held, take_notes, train_sharded
from planned_jobs import HALF, RECOMPUTED
from ranks import run_ranks

from bridge.config import ModelConfig
from bridge.dist.plan.count.rank import measure_rank
from bridge.dist.wrapper import Wrapper

CASES = {
    "dp": Case(preset="tiny", distributed_optimizer=True),
    "tp pp": Case(preset="tiny", sizes={"tp": 2, "pp": 2}),
    # The CPU's layer norm keeps its statistics in half precision, that of a GPU in full.
    "pp vp, half": Case(
        preset="tiny", sizes={"pp": 2, "vp": 2}, distributed_optimizer=True, overrides=HALF, keeps_alike=False
    ),
    "pp vp": Case(preset="tiny", sizes={"pp": 2, "vp": 2}, distributed_optimizer=True),
    "tp sp": Case(preset="tiny", sizes={"tp": 2}, sequence_parallel=True),
    "tp sp, recomputed": Case(preset="tiny", sizes={"tp": 2}, sequence_parallel=True, overrides=RECOMPUTED),
    "cp, rotary, grouped queries": Case(
        preset="tiny",
        sizes={"cp": 2},
        overrides=("position_embedding_type=rope", "transformer.num_query_groups=2"),
        distributed_optimizer=True,
    ),
    # On a CPU torch has no fused attention for values of another width than queries, nor for a bias with a gradient.
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
def real() -> list[dict[str, Held]]:
    return run_ranks(held, WORLD, CASES, timeout=240)


@pytest.mark.parametrize("name", CASES)
def test_the_plan_of_every_rank_matches_its_measurements(name: str, real: list[dict[str, Held]]) -> None:
    case = CASES[name]
    job = case.job()
    layout = job.check(ModelConfig.from_dict(job.document), WORLD)
    for rank in range(WORLD):
        planned = measure_rank(job, layout, BATCH, rank=rank, memo={})
        assert (
            Held(
                parameters=take_notes(),
                weights=planned.weights,
                gradients=planned.gradients,
                master=planned.master,
                state=planned.state,
                buckets=planned.buckets,
                kept=None if not case.keeps_alike else [chunk.work.kept for chunk in planned.chunks],
            )
            == real[rank][name]
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


@pytest.fixture(scope="module")
def real_in_parts() -> list[dict[str, HeldSharded]]:
    return run_ranks(train_sharded, WORLD, SHARDED, timeout=240)


@pytest.mark.parametrize("name", SHARDED)
def test_the_plan_of_every_sharded_rank_matches_its_measurements(
    name: str, real_in_parts: list[dict[str, HeldSharded]]
) -> None:
    job = SHARDED[name].job()
    layout = job.check(ModelConfig.from_dict(job.document), WORLD)
    for rank in (0, WORLD - 1):  # of each kind of parallelism the first and the last
        planned = measure_rank(job, layout, LONGER, rank=rank, memo={})
        calls = planned.traffic.count(LONGER.count_microbatches(layout))
        assert (
            HeldSharded(
                parameters=take_notes(),
                weights=planned.weights,
                gradients=planned.gradients,
                master=planned.master,
                state=planned.state,
                whole=planned.unsharded,
                collectives={
                    (group, operation): (calls.number[group, ranks, operation], size)
                    for (group, ranks, operation), size in calls.size.items()
                    if group in ("dp_cp", "expt_dp") and operation != "allreduce"
                },
            )
            == real_in_parts[rank][name]
        )
