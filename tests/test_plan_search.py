"""A search finds the same as planning everything, with few plans."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Any

import pytest
from planned_jobs import measure_layers

from bridge.config import BridgeError, Document
from bridge.dist.document_layout import replace_layout
from bridge.dist.errors import PlanError
from bridge.dist.job import make_builder
from bridge.dist.layout import Layout
from bridge.dist.plan.count.microbatch import Memo
from bridge.dist.plan.forecast.bounds import Bounds
from bridge.dist.plan.forecast.machine import load_machine
from bridge.dist.plan.forecast.ranking import Candidate
from bridge.dist.plan.forecast.search import Progress, search
from bridge.dist.plan.forecast.space import NO_RECOMPUTE, Choice, Fixed, Recompute, list_choices, list_recomputations
from bridge.dist.plan.forecast.step_time import estimate_time
from bridge.dist.plan.plan import PlanOptions, plan
from bridge.dist.train.batch import Batch
from bridge.dist.wrapper import ShardingStrategy, Wrapper

H100 = load_machine("h100")
TOP = 3


class ThisProcess(Executor):
    """Runs what is submitted at once."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **options))
        return future


def plan_everything(document: Document, options: PlanOptions, fixed: Fixed) -> tuple[list[Candidate], Candidate]:
    """Plan every choice; return the fastest of each layout and of DDP among those that fit; check the bounds of all."""
    bounds, memo = Bounds(document, options, H100, fixed), Memo()
    config = make_builder(document.config()).transformer_config
    best: dict[Layout, Candidate] = {}
    with_ddp: list[Candidate] = []

    def try_choice(choice: Choice) -> bool:
        try:
            planned = plan(choice.apply(document, fixed), choice.change_options(options), memo=memo)
        except BridgeError:
            return True
        candidate = Candidate(choice, planned, estimate_time(planned, H100))
        seconds = []
        for count in (bounds.count_seconds, bounds.count_seconds, bounds.simulate_seconds):
            seconds.append(count(choice))
            assert bounds.count_bytes(choice) <= planned.worst.total_bytes, str(choice)
            measure_layers(bounds, choice, document, options, fixed, memo=memo)
        assert seconds == sorted(seconds), str(choice)
        assert seconds[-1] <= candidate.seconds, str(choice)
        if planned.fits:
            best[choice.layout] = min(candidate, best.get(choice.layout, candidate))
            with_ddp.extend([candidate] if choice.wrapper is Wrapper.DDP else [])
        return bool(planned.fits)

    for choice in list_choices(config, options, fixed):
        if isinstance(choice, Choice) and not try_choice(choice):
            for other in list_recomputations(choice, config):
                try_choice(other)
    return sorted(best.values()), min(with_ddp)


@pytest.mark.parametrize(
    ("preset", "memory", "fixed"),
    [
        ("tiny", 3_150_000, Fixed(sizes={"tp": 2, "vp": 1}, micro_batch_size=2)),
        ("moe-tiny", 4_000_000, Fixed(sizes={"tp": 1, "vp": 1}, micro_batch_size=1, distributed_optimizer=True)),
        (
            "mla-tiny",
            4_000_000,
            Fixed(sizes={"tp": 2, "vp": 1}, micro_batch_size=4, wrapper=Wrapper.DDP, distributed_optimizer=True),
        ),
    ],
)
def test_a_search_finds_what_planning_everything_finds(preset: str, memory: int, fixed: Fixed) -> None:
    document = Document.load(preset)
    replace_layout(document, {}, sequence_parallel=False)
    batch = Batch(seq_length=64, global_batch_size=16)
    options = PlanOptions(batch=batch, world_size=4, gpu_memory=memory, reserve=0)
    everything, with_ddp = plan_everything(document, options, fixed)
    states: list[Progress] = []

    def watch(found: Any) -> Any:
        for state in found:
            states.append(state)
            yield state

    found = search(document, options, H100, fixed=fixed, top=TOP, executor=ThisProcess(), watch=watch)
    assert [(one.choice, one.seconds) for one in found.candidates] == [
        (one.choice, one.seconds) for one in everything[:TOP]
    ]
    assert all(one.plan.worst.total_bytes <= memory for one in found.candidates)
    assert found.too_large
    assert states[-1].left == 0
    assert states[-1].best == found.candidates[0]
    assert len(found.explain_ranking()) == len(found.candidates) - 1
    first = search(document, options, H100, fixed=fixed, top=1, executor=ThisProcess())
    shards = everything[0].choice.wrapper is not Wrapper.DDP
    assert shards == (preset == "tiny")
    assert (first.with_ddp and first.with_ddp.choice) == (with_ddp.choice if shards else None)


@pytest.mark.parametrize(
    "recompute",
    [
        Recompute("full", "uniform", 1),
        Recompute("full", "uniform", 2),
        Recompute("full", "block", 1),
        Recompute.of({"recompute_granularity": "selective"}),
    ],
)
def test_the_recomputation_that_the_user_sets_is_part_of_the_bounds(recompute: Recompute) -> None:
    document = Document.load("tiny", ["transformer.num_layers=16"])
    options = PlanOptions(batch=Batch(seq_length=512, global_batch_size=16), world_size=4, gpu_memory=2**30, reserve=0)
    fixed = Fixed(
        sizes={"tp": 1, "pp": 4, "vp": 1, "cp": 1},
        micro_batch_size=4,
        wrapper=Wrapper.DDP,
        distributed_optimizer=True,
        recompute=recompute,
    )
    found, _ = plan_everything(document, options, fixed)
    assert [one.choice.recompute for one in found] == [recompute]


def test_the_bound_of_memory_counts_what_the_backward_pass_recomputes() -> None:
    """Otherwise a search would plan many choices that do not fit."""
    document = Document.load("tiny", ["transformer.num_layers=16"])
    options = PlanOptions(batch=Batch(seq_length=512, global_batch_size=16), world_size=4)
    choice = Choice(
        layout=Layout(pp=4, dp=1),
        micro_batch_size=4,
        wrapper=Wrapper.DDP,
        distributed_optimizer=True,
        recompute=Recompute("full", "uniform", 1),
    )
    bounds, memo = Bounds(document, options, H100, Fixed()), Memo()
    measure_layers(bounds, choice, document, options, Fixed(), memo=memo)
    planned = plan(choice.apply(document, Fixed()), choice.change_options(options), memo=memo)
    assert 0.999 * planned.worst.total_bytes <= bounds.count_bytes(choice) <= planned.worst.total_bytes


def test_a_search_that_finds_nothing_says_what_needs_the_least_memory() -> None:
    document = Document.load("tiny")
    batch = Batch(seq_length=64, global_batch_size=16)
    options = PlanOptions(batch=batch, world_size=4, gpu_memory=2**20, reserve=0)
    fixed = Fixed(sizes={"tp": 2, "pp": 2, "vp": 1}, micro_batch_size=1, recompute=NO_RECOMPUTE)
    with pytest.raises(PlanError) as raised:
        search(document, options, H100, fixed=fixed, executor=ThisProcess())
    first, second = str(raised.value).splitlines()
    assert first == "nothing fits on 4 GPUs: 1 choice is too large"
    assert re.fullmatch(
        r"tp2 pp2, micro-batch 1, ddp needs the least memory: 0\.001 GiB, which is 0\.001 GiB more .*", second
    )


def test_refused_choices_are_counted_by_reason() -> None:
    options = PlanOptions(batch=Batch(seq_length=64, global_batch_size=3), world_size=4)
    with pytest.raises(PlanError, match=r"(1 is|\d+ are) refused because the global batch of 3 samples does not"):
        search(Document.load("tiny"), options, H100, fixed=Fixed(sizes={"tp": 1, "pp": 1}), executor=ThisProcess())


def test_three_strategies_of_megatron_fsdp_are_tried_or_the_one_that_the_user_sets() -> None:
    config = make_builder(Document.load("tiny").config()).transformer_config
    options = PlanOptions(batch=Batch(seq_length=64, global_batch_size=16), world_size=2)

    def list_strategies(fixed: Fixed) -> list[ShardingStrategy | None]:
        choices = [one for one in list_choices(config, options, fixed) if isinstance(one, Choice)]
        return [one.sharding_strategy for one in choices if one.wrapper is Wrapper.MEGATRON_FSDP]

    one = Fixed(sizes={"tp": 1, "pp": 1, "cp": 1}, micro_batch_size=1)
    assert list_strategies(one) == ["optim_grads_params", "optim_grads", "optim"]
    assert list_strategies(replace(one, sharding_strategy=ShardingStrategy.NO_SHARD)) == ["no_shard"]


def test_virtual_stages_are_searched_with_a_pipeline_only() -> None:
    config = make_builder(Document.load("tiny").config()).transformer_config
    options = PlanOptions(batch=Batch(seq_length=64, global_batch_size=16), world_size=2)
    found = list(list_choices(config, options, Fixed(sizes={"vp": 2}, wrapper=Wrapper.DDP)))
    assert {(one.layout.pp, one.layout.vp) for one in found if isinstance(one, Choice)} == {(2, 2)}
    assert any(isinstance(one, str) and "vp = 2 needs a pipeline" in one for one in found)


def test_what_the_user_sets_is_kept() -> None:
    document = Document.load("tiny", ["transformer.recompute_granularity=selective"])
    fixed = Fixed(sizes={"tp": 2}, fields={"sequence_parallel": False}, micro_batch_size=4, wrapper=Wrapper.NONE)
    config = make_builder(document.config()).transformer_config
    options = PlanOptions(batch=Batch(seq_length=64, global_batch_size=16), world_size=8)
    choices = [one for one in list_choices(config, options, fixed) if isinstance(one, Choice)]
    assert {(one.layout.tp, one.micro_batch_size, one.wrapper) for one in choices} == {(2, 4, Wrapper.NONE)}
    assert {one.layout.pp for one in choices} == {1, 2, 4}
    changed = choices[-1].apply(document, fixed).data["transformer"]
    assert (changed["tensor_model_parallel_size"], changed["sequence_parallel"]) == (2, False)
    assert "recompute_granularity" not in changed
