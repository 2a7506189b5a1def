"""Plans with Transformer Engine's layers, which need a process of their own; printed as JSON by name."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bridge.config import Document
from bridge.dist.document_layout import apply_layout
from bridge.dist.plan.layers import Layers, prepare_process
from bridge.dist.process.imports import import_megatron
from bridge.dist.wrapper import ShardingStrategy

FUSED = ("transformer.bias_activation_fusion=true", "transformer.bias_dropout_fusion=true")
SPLIT = (
    "transformer.sequence_parallel=true",
    "transformer.account_for_embedding_in_pipeline_split=true",
    "transformer.account_for_loss_in_pipeline_split=true",
)


def plan_preset(
    preset: str, sizes: dict[str, int], *overrides: str, seq: int, gbs: int, gpus: int, transposes_fp8: bool = True
) -> Any:
    """Return a plan with the distributed optimizer."""
    from bridge.dist.plan.plan import PlanOptions, plan
    from bridge.dist.train.batch import Batch

    document = Document.load(preset, list(overrides))
    apply_layout(document, sizes)
    return plan(
        document,
        PlanOptions(
            batch=Batch(seq_length=seq, global_batch_size=gbs),
            world_size=gpus,
            distributed_optimizer=True,
            transposes_fp8=transposes_fp8,
            layers=Layers.TRANSFORMER_ENGINE,
        ),
    )


SAME_WORK: dict[str, tuple[str, dict[str, int], tuple[str, ...]]] = {
    "sequence parallelism": ("tiny", {"tp": 2, "pp": 2}, ("transformer.sequence_parallel=true",)),
    "no sequence parallelism": ("tiny", {"tp": 2, "pp": 2}, ()),
    "experts": ("moe-tiny", {"tp": 2, "ep": 2}, ()),
    "hybrid": ("hybrid-tiny", {"tp": 2}, ("transformer.sequence_parallel=true",)),
    "encoder and decoder": ("t5-tiny", {"tp": 2}, ("transformer.sequence_parallel=true",)),
}
"""Jobs in which Transformer Engine's layers and Bridge's layers in PyTorch do the same work."""


def list_work(planned: Any) -> list[Any]:
    """Return the parameters, FLOPs and traffic of each stage, as JSON types."""
    return [
        [stage.parameters, stage.flops, [[t.group, t.ranks, t.operation, t.calls, t.bytes] for t in stage.traffic]]
        for stage in planned.stages
    ]


def measure_layer(preset: str, sizes: dict[str, int], *overrides: str, seq: int) -> float:
    """Return the MiB that a layer keeps of a microbatch: the difference between models of three and of two layers."""

    def measure(layers: int) -> int:
        every = ",".join("1" * layers)
        of_experts = [f"transformer.moe_layer_freq=[{every}]"] if preset == "deepseek-v3" else []
        more = (f"transformer.num_layers={layers}", *of_experts, *FUSED, *overrides)
        found = plan_preset(preset, sizes, *more, seq=seq, gbs=8, gpus=8)
        kept: int = found.stages[0].chunks[0].activation_bytes
        return kept

    return (measure(3) - measure(2)) / 2**20


def recompute(modules: str) -> tuple[str, ...]:
    """Return overrides that recompute modules."""
    return ("transformer.recompute_granularity=selective", f"transformer.recompute_modules=[{modules}]")


def plan_llama_405b() -> dict[str, Any]:
    """Plan the published layouts of Llama 3.1 405B."""
    layouts = {
        "16,384 GPUs": ({"tp": 8, "pp": 16, "vp": 8}, 4096, 16384),
        "16,384 GPUs, 16 microbatches": ({"tp": 8, "pp": 16, "vp": 8}, 2048, 16384),
        "1,024 GPUs": ({"tp": 8, "pp": 8, "vp": 8, "cp": 2}, 1536, 1024),
    }
    found = {}
    for name, (sizes, gbs, gpus) in layouts.items():
        one = plan_preset("llama-3.1-405b", sizes, *SPLIT, *FUSED, seq=8192, gbs=gbs, gpus=gpus)
        found[name] = {
            "stage": one.worst.pp,
            "gib": one.worst.total_bytes / 2**30,
            "seconds": one.seconds,
            "fusions": one.fusions,
        }
    return found


def measure_dense_layer(*overrides: str, transposes_fp8: bool = True) -> tuple[float, float]:
    """Return the MiB that a layer of Llama 3.1 405B keeps, and the bytes that it holds for each parameter."""
    few, more = (
        plan_preset(
            "llama-3.1-405b",
            {"tp": 8},
            f"transformer.num_layers={layers}",
            "transformer.sequence_parallel=true",
            *FUSED,
            *overrides,
            seq=8192,
            gbs=1,
            gpus=8,
            transposes_fp8=transposes_fp8,
        ).stages[0]
        for layers in (2, 3)
    )
    kept = more.chunks[0].activation_bytes - few.chunks[0].activation_bytes
    return kept / 2**20, (more.weight_bytes - few.weight_bytes) / (more.parameters - few.parameters)


def measure_recomputed(*overrides: str) -> float:
    """Return the MiB that the backward pass recomputes at once, in two layers of Llama 3.1 405B."""
    split = ("transformer.num_layers=4", "transformer.sequence_parallel=true")
    found = plan_preset("llama-3.1-405b", {"tp": 8, "pp": 2}, *split, *FUSED, *overrides, seq=8192, gbs=2, gpus=16)
    recomputed: int = found.stages[0].chunks[0].temporary_bytes
    return recomputed / 2**20


def recompute_layers(number: int) -> tuple[str, ...]:
    """Return overrides that recompute all layers, a number of them at once."""
    names = {"granularity": "full", "method": "uniform", "num_layers": number}
    return tuple(f"transformer.recompute_{name}={value}" for name, value in names.items())


def plan_ring() -> list[Any]:
    """Return the traffic of a small model whose sequence is split over four ranks."""
    options = {"seq": 64, "gbs": 1, "gpus": 4}
    overrides = ("transformer.bf16=true", "transformer.params_dtype=torch.bfloat16")
    return list_work(plan_preset("tiny", {"cp": 4}, *overrides, **options))


EIGHT_BITS = ("tensorwise", "delayed", "mxfp8", "blockwise")
QWEN = ("", "moe_act", "layernorm", "moe")
DEEPSEEK = ("", "mla_up_proj", "moe_act", "shared_experts", "layernorm", "mla_up_proj,moe_act,layernorm")


def plan_same_work(job: str) -> list[Any]:
    """Return the work of a job in ``SAME_WORK``."""
    preset, sizes, overrides = SAME_WORK[job]
    return list_work(plan_preset(preset, sizes, *overrides, seq=64, gbs=8, gpus=8))


def measure_experts(preset: str, modules: str) -> float:
    """Return the MiB that a layer keeps with eight expert-parallel ranks, recomputing modules."""
    return measure_layer(preset, {"ep": 8}, *(recompute(modules) if modules else ()), seq=4096)


def plan_recipes() -> dict[str, Any]:
    """Plan published recipes: whether each fits, and the time of the 8B one beside a lower bound of every choice's."""
    from planned_jobs import measure_layers

    from bridge.dist.job import make_builder
    from bridge.dist.plan.forecast.bounds import Bounds
    from bridge.dist.plan.forecast.machine import load_machine
    from bridge.dist.plan.forecast.space import Choice, list_choices

    script = runpy.run_path(str(Path(__file__).parents[1] / ".github/scripts/compare_recipes.py"))
    recipes = script["RECIPES"]
    planned = {name: script["plan_published"](recipes[name]) for name in ("8b", "70b", "405b")}
    document, options, fixed = script["prepare"](recipes["8b"])
    bounds = Bounds(document, options, load_machine("h100"), fixed)
    choices = list_choices(make_builder(document.config()).transformer_config, options, fixed)
    bound = min(bounds.count_seconds(one) for one in choices if isinstance(one, Choice))
    choice = replace(planned["8b"].choice, sharding_strategy=ShardingStrategy.OPTIM_GRADS_PARAMS)
    measure_layers(bounds, choice, document, options, fixed)
    return {
        "fit": {name: one.plan.fits for name, one in planned.items()},
        "seconds": planned["8b"].seconds,
        "bound": bound,
        "bound with measured layers": bounds.simulate_seconds(choice),
    }


CASES: dict[str, Callable[[], Any]] = {
    "recipes": plan_recipes,
    "ring": plan_ring,
    **{job: partial(plan_same_work, job) for job in SAME_WORK},
    "bf16": measure_dense_layer,
    "recomputed attention": partial(measure_dense_layer, *recompute("core_attn")),
    "recomputed at once: nothing": measure_recomputed,
    "recomputed at once: a layer": partial(measure_recomputed, *recompute_layers(1)),
    "recomputed at once: two layers": partial(measure_recomputed, *recompute_layers(2)),
    "recomputed at once: a feed-forward layer": partial(measure_recomputed, *recompute("mlp")),
    "8-bit weights": partial(
        measure_dense_layer,
        "transformer.fp8=hybrid",
        "transformer.fp8_recipe=tensorwise",
        "transformer.fp8_param=true",
    ),
    **{
        recipe: partial(measure_dense_layer, "transformer.fp8=hybrid", f"transformer.fp8_recipe={recipe}")
        for recipe in EIGHT_BITS
    },
    **{
        f"{recipe} on Blackwell": partial(
            measure_dense_layer, "transformer.fp8=hybrid", f"transformer.fp8_recipe={recipe}", transposes_fp8=False
        )
        for recipe in ("tensorwise", "mxfp8")
    },
    "llama 405b": plan_llama_405b,
    **{f"qwen3 30b {modules}": partial(measure_experts, "qwen3-30b-a3b", modules) for modules in QWEN},
    **{f"deepseek v3 {modules}": partial(measure_experts, "deepseek-v3", modules) for modules in DEEPSEEK},
}


if __name__ == "__main__":
    prepare_process(Layers.TRANSFORMER_ENGINE)
    import_megatron(with_compiler=False)
    json.dump({name: case() for name, case in CASES.items()}, sys.stdout)
