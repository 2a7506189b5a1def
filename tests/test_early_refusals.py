"""Sizes that arithmetic rules out are refused with the nearest ones that work, without torch."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import pytest

from bridge.config import BridgeError, Document
from bridge.dist.checks.document import refuse_before_imports
from bridge.dist.document_layout import apply_layout
from bridge.dist.errors import PreflightError, TrainingError
from bridge.dist.layout import Layout
from bridge.dist.nearest import find_nearest, suggest, suggest_multiple
from bridge.dist.plan.request import PlanRequest
from bridge.dist.run.commands.search import _refuse_early as refuse_early
from bridge.dist.train.batch import Batch
from bridge.dist.wrapper import ShardingStrategy, Wrapper

EMBEDDING = "transformer.account_for_embedding_in_pipeline_split"
LOSS = "transformer.account_for_loss_in_pipeline_split"
PP = "transformer.pipeline_model_parallel_size"
VP = "transformer.virtual_pipeline_model_parallel_size"
STAGES = "transformer.pipeline_model_parallel_layout"
ASSIGN = "or assign layers to stages in pipeline_model_parallel_layout"


class Case(NamedTuple):
    """A layout that a preset cannot have, and the last part of the message: what to change."""

    preset: str
    sizes: dict[str, int]
    advice: str
    overrides: tuple[str, ...] = ()
    ranks: int | None = None
    advised: dict[str, Any] = {}  # noqa: RUF012 - a constant
    """Sizes and overrides, one of the advised changes."""


CASES = {
    "126 layers in 128 chunks": Case(
        "llama-3.1-405b",
        {"tp": 8, "pp": 16, "vp": 8},
        "= 128 equal stages: set account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split to "
        f"True, {ASSIGN}",
        advised={EMBEDDING: True, LOSS: True},
    ),
    "126 layers in 127 chunks": Case(
        "llama-3.1-405b",
        {"pp": 127},
        "set account_for_embedding_in_pipeline_split or account_for_loss_in_pipeline_split to True, the other to "
        f"False, choose pp = 126, {ASSIGN}",
        advised={LOSS: True},
    ),
    "126 layers on 4 ranks": Case(
        "llama-3.1-405b",
        {"pp": 4, "vp": 3},
        f"= 12 equal stages: choose pp = 3 or 6 with vp = 3, {ASSIGN}",
        advised={"pp": 6},
    ),
    "126 layers in 24 chunks": Case(
        "llama-3.1-405b",
        {"pp": 6, "vp": 4},
        f"= 24 equal stages: choose vp = 3 or 7 with pp = 6, {ASSIGN}",
        advised={"vp": 7},
    ),
    "one layer in four chunks": Case(
        "tiny",
        {"pp": 2, "vp": 2},
        "= 4 equal stages: assign layers to stages in pipeline_model_parallel_layout",
        ("transformer.num_layers=1",),
    ),
    "126 layers and the embedding": Case(
        "llama-3.1-405b",
        {"pp": 16},
        "with the embedding 127, does not divide into pp x vp = 16 x 1 = 16 equal stages: set "
        "account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split to True, choose pp = 1 or "
        f"127, {ASSIGN}",
        (f"{EMBEDDING}=true",),
        advised={LOSS: True},
    ),
    "virtual stages without a pipeline": Case(
        "tiny", {"vp": 2}, "vp = 2 needs a pipeline, but pp = 1: set pp to 2 or more", advised={"pp": 2}
    ),
    "a document's virtual stages on one pipeline rank": Case(
        "tiny",
        {"pp": 1},
        "or vp (virtual_pipeline_model_parallel_size) to 1",
        (f"{PP}=2", f"{VP}=2"),
        advised={"vp": 1},
    ),
    "virtual stages of a pipeline layout": Case(
        "tiny",
        {},
        "vp = 3 needs a pipeline, but pp = 1: set pp to 2 or more, or vp (virtual_pipeline_model_parallel_size) to 1 "
        "and pipeline_model_parallel_layout to null",
        (f"{STAGES}=Et|tt|tL",),
        advised={STAGES: "null"},
    ),
    "a pipeline layout without virtual stages": Case(
        "tiny",
        {"vp": 1},
        "pipeline_model_parallel_layout has 3 stages for pp = 1 ranks, but vp = 1: set pp = 3",
        (f"{STAGES}=Et|tt|tL",),
        advised={"pp": 3},
    ),
    "heads": Case("llama-3.1-8b", {"tp": 3}, "choose tp = 2 or 4", advised={"tp": 4}),
    "heads, groups and widths": Case("qwen2.5-7b", {"tp": 3}, "choose tp = 2 or 4", advised={"tp": 4}),
    "groups": Case("nemotron-h-8b", {"tp": 3}, "choose tp = 2 or 4", advised={"tp": 2}),
    "experts": Case("moe-tiny", {"ep": 3}, "choose ep = 2 or 4", ranks=6, advised={"ep": 2}),
    "experts on too few ranks": Case(
        "qwen3-30b-a3b", {"ep": 16, "tp": 4}, "choose ep = 4", ranks=16, advised={"ep": 4}
    ),
    "experts split further than a stage": Case(
        "moe-tiny", {"tp": 2, "etp": 8}, "choose etp = 4", ranks=4, advised={"etp": 4}
    ),
    "Mamba groups": Case(
        "nemotron-h-8b",
        {"tp": 16},
        "mamba_num_groups = 8 is not a multiple of tp = 16: choose tp = 8",
        advised={"tp": 8},
    ),
    "ranks": Case("llama-3.1-8b", {"tp": 8, "pp": 2}, "start 96 or 112 ranks, or lower tp, pp or cp", ranks=100),
}


def refuse(case: Case, sizes: dict[str, int], *overrides: str) -> None:
    document = Document.load(case.preset, [*case.overrides, *overrides])
    apply_layout(document, sizes)
    refuse_before_imports(document, wrapper=Wrapper.DDP, world_size=case.ranks)


@pytest.mark.parametrize("name", CASES)
def test_an_impossible_layout_is_refused_with_the_nearest_that_works(name: str) -> None:
    case = CASES[name]
    with pytest.raises(BridgeError) as error:
        refuse(case, case.sizes)
    assert case.advice in str(error.value)
    if case.advised:
        sizes = {axis: size for axis, size in case.advised.items() if "." not in axis}
        refuse(case, case.sizes | sizes, *(f"{path}={value}" for path, value in case.advised.items() if "." in path))


ONLY_FULLY_SHARDED = "with data_parallel_sharding_strategy {}: set the strategy to optim_grads_params"


@pytest.mark.parametrize(
    ("recipe", "options", "refusal"),
    [
        ("tensorwise", {"wrapper": Wrapper.DDP}, "fp8_param needs a distributed optimizer"),
        ("tensorwise", {"wrapper": Wrapper.DDP, "distributed_optimizer": True}, None),
        ("mxfp8", {"wrapper": Wrapper.DDP, "distributed_optimizer": True}, None),
        *[
            (
                "tensorwise",
                {"wrapper": Wrapper.MEGATRON_FSDP, "sharding_strategy": strategy},
                ONLY_FULLY_SHARDED.format(strategy),
            )
            for strategy in (ShardingStrategy.NO_SHARD, ShardingStrategy.OPTIM, ShardingStrategy.OPTIM_GRADS)
        ],
        ("mxfp8", {"wrapper": Wrapper.MEGATRON_FSDP}, None),
        ("tensorwise", {"wrapper": Wrapper.TORCH_FSDP2}, "torch FSDP2 does not support FP8 or FP4 parameters"),
        ("tensorwise", {"wrapper": Wrapper.NONE}, None),
    ],
)
def test_eight_bit_weights_need_a_wrapper_that_updates_them(
    recipe: str, options: dict[str, Any], refusal: str | None
) -> None:
    fields = {"fp8": "hybrid", "fp8_param": "true", "fp8_recipe": recipe}
    document = Document.load("tiny", [f"transformer.{name}={value}" for name, value in fields.items()])
    with contextlib.nullcontext() if refusal is None else pytest.raises(PreflightError, match=refusal):
        refuse_before_imports(document, **options)


def test_a_search_refuses_early_only_what_no_wrapper_can_train() -> None:
    document = Document.load("tiny", ["transformer.fp8=hybrid", "transformer.fp8_param=true"])
    request = PlanRequest(gpus=2, tp=1, pp=1)
    for wrapper in (None, Wrapper.DDP, Wrapper.MEGATRON_FSDP):
        refuse_early(document, request, {"wrapper": wrapper, "distributed_optimizer": None})
    with pytest.raises(PreflightError, match="fp8_param needs a distributed optimizer"):
        refuse_early(document, request, {"wrapper": Wrapper.DDP, "distributed_optimizer": False})
    with pytest.raises(PreflightError, match="torch FSDP2 does not support FP8"):
        refuse_early(document, request, {"wrapper": Wrapper.TORCH_FSDP2, "distributed_optimizer": None})


@pytest.mark.parametrize(
    ("batch", "layout", "advice"),
    [
        (Batch(seq_length=8, global_batch_size=10), Layout(dp=4), "multiple of 4, such as 8 or 12"),
        (Batch(seq_length=8, global_batch_size=2, micro_batch_size=3), Layout(), "multiple of 3, such as 3"),
        (Batch(seq_length=8, global_batch_size=20), Layout(pp=4, vp=2, dp=2), "global batch of 16 or 24 samples"),
        (Batch(seq_length=8, global_batch_size=2), Layout(pp=4, vp=2), "global batch of 4 samples"),
    ],
)
def test_an_impossible_batch_is_refused_with_the_nearest_that_works(batch: Batch, layout: Layout, advice: str) -> None:
    with pytest.raises(TrainingError, match=advice):
        batch.count_microbatches(layout)


def test_the_nearest_sizes() -> None:
    assert find_nearest(7, lambda size: 12 % size == 0, largest=12) == [6, 12]
    assert find_nearest(20, lambda size: 12 % size == 0, largest=12) == [12]
    assert find_nearest(1, lambda size: size % 2 == 0, largest=1) == []
    assert suggest("tp", 3, lambda size: size in (2, 4), largest=8) == "tp = 2 or 4"
    assert suggest("tp", 3, lambda size: False, largest=8) == ""
    assert suggest_multiple(10, 4) == "8 or 12"
    assert suggest_multiple(3, 4) == "4"
