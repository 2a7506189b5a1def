"""Plans that count Transformer Engine's layers, against what its source keeps and what NVIDIA's recipes need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from megatron.core.transformer import TransformerConfig
from planned_jobs import plan_preset
from transformer_engine_plans import SAME_WORK, list_work

from bridge.config import Document
from bridge.dist.errors import PlanError
from bridge.dist.fusions import choose_fusions
from bridge.dist.plan.layers import Layers, choose_layers, prepare_process
from bridge.dist.plan.plan import PlanOptions, plan
from bridge.dist.plan.support import check_supported, leave_out_offloading
from bridge.dist.train.batch import Batch


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    script = Path(__file__).with_name("transformer_engine_plans.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plans: dict[str, Any] = json.loads(done.stdout)
    return plans


@pytest.mark.parametrize(
    ("job", "gib"),
    [("16,384 GPUs", 88.1), ("16,384 GPUs, 16 microbatches", 81.7), ("1,024 GPUs", 74.5)],
)
def test_llama_405b_needs_what_its_layouts_were_published_with(job: str, gib: float, found: dict[str, Any]) -> None:
    one = found["llama 405b"][job]
    assert one["stage"] == 1
    assert one["gib"] == pytest.approx(gib, abs=0.5 if job == "1,024 GPUs" else 0.1)
    assert one["fusions"] == ["apply_rope_fusion"]


def test_published_recipes_fit_and_the_one_of_8b_is_among_the_fastest(found: dict[str, Any]) -> None:
    """The bound is that of the fastest choice of a search, or below: so the recipe is within 10 % of the first choice.

    `.github/scripts/compare_recipes.py` searches for all five recipes, which takes minutes.
    """
    recipes = found["recipes"]
    assert recipes["fit"] == {"8b": True, "70b": True, "405b": True}
    assert recipes["bound"] <= recipes["seconds"] <= 1.1 * recipes["bound"]
    # Its weights are in 8 bits. A search that cannot measure their layers plans hundreds of choices.
    assert recipes["bound with measured layers"] <= recipes["seconds"] <= 1.01 * recipes["bound with measured layers"]


@pytest.mark.parametrize(
    ("storage", "mib", "bytes_per_parameter"),
    [
        # 16 Mi values: 8 bytes for the inputs and outputs of two norms, 4 for queries and the output of attention, 0.25
        # for keys and values, 19.5 for the activation function's input and output; 0.5 MiB for sums of scores.
        ("bf16", 508.5, 2),
        # The output is computed again, but keys and values remain views of one tensor with queries.
        ("recomputed attention", 546 - 4, 2),
        # Two copies of each weight, one transposed.
        ("tensorwise", 424.5, 4),
        ("delayed", 440.5, 4),
        ("mxfp8", 427.1, 2 + 2 * 33 / 32),
        ("blockwise", 427.1, 4),
        # Products of whole tensors need no transposed copy there, those with scales of blocks do.
        ("tensorwise on Blackwell", 424.5, 3),
        ("mxfp8 on Blackwell", 427.1, 2 + 2 * 33 / 32),
        ("8-bit weights", 424.5, 2),
    ],
)
def test_a_layer_of_llama_405b(storage: str, mib: float, bytes_per_parameter: float, found: dict[str, Any]) -> None:
    kept, held = found[storage]
    assert kept == pytest.approx(mib, abs=0.1)
    assert held == pytest.approx(bytes_per_parameter, abs=0.001)  # norms stay in half precision


@pytest.mark.parametrize(
    ("part", "mib"),
    [
        ("nothing", 0),
        # As above, except the input, which is kept: 2 bytes of 16 Mi values.
        ("a layer", 508.5 - 32),
        ("two layers", 2 * 508.5 - 32),
        # The output of a norm, and 19.5 bytes of 16 Mi values around the activation function.
        ("a feed-forward layer", 32 + 312),
    ],
)
def test_what_the_backward_pass_recomputes_at_once(part: str, mib: float, found: dict[str, Any]) -> None:
    assert found[f"recomputed at once: {part}"] == pytest.approx(mib, abs=0.1)


@pytest.mark.parametrize("job", SAME_WORK)
def test_work_and_traffic_are_those_of_layers_in_pytorch(job: str, found: dict[str, Any]) -> None:
    preset, sizes, overrides = SAME_WORK[job]
    batch = Batch(seq_length=64, global_batch_size=8)
    planned = plan_preset(preset, sizes, *overrides, world_size=8, batch=batch, distributed_optimizer=True)
    assert found[job] == list_work(planned)


def test_keys_and_values_go_around_a_ring(found: dict[str, Any]) -> None:
    # A rank passes on 3 times the keys and values of 16 tokens in each of 4 layers, 2 bytes x 64 channels; then the
    # same with their gradients.
    ((_, _, traffic),) = found["ring"]
    calls = 4 * 2 * 3 * (1 + 2)
    assert ["cp", 4, "send", calls, calls * 16 * 2 * 64] in traffic


@pytest.mark.parametrize(
    ("layer", "mib"),
    [
        # Angles of rotary positions, 2 MiB, are shared by the layers.
        ("qwen3 30b ", 454 - 2),
        ("qwen3 30b moe_act", 406 - 2),
        ("qwen3 30b layernorm", 438 - 2),
        ("qwen3 30b moe", 175 - 2),
        # What a router selects groups of experts with, 2 MiB, is freed at once: no gradient depends on it.
        ("deepseek v3 ", 1799 - 2),
        ("deepseek v3 mla_up_proj", 1270 - 2),
        ("deepseek v3 moe_act", 1671 - 2),
        ("deepseek v3 shared_experts", 1751 - 2),
        ("deepseek v3 layernorm", 1687 - 2),
        ("deepseek v3 mla_up_proj,moe_act,layernorm", 1030 - 2),
    ],
)
def test_a_layer_of_experts(layer: str, mib: float, found: dict[str, Any]) -> None:
    assert found[layer] == pytest.approx(mib, abs=1)


@pytest.mark.parametrize(
    ("preset", "overrides", "chosen"),
    [
        ("qwen3-30b-a3b", [], ["apply_rope_fusion", "moe_permute_fusion"]),
        ("qwen3-30b-a3b", ["transformer.apply_rope_fusion=false"], ["moe_permute_fusion"]),
        ("qwen3-30b-a3b", ["transformer.transformer_impl=local"], []),
        ("llama-3-8b", ["transformer.rotary_interleaved=true"], []),
        ("deepseek-v3", [], ["moe_permute_fusion"]),  # the kernel for latent attention is experimental
        ("gpt2-124m", [], []),
    ],
)
def test_fusions_are_chosen_where_they_apply(preset: str, overrides: list[str], chosen: list[str]) -> None:
    document = Document.load(preset, overrides)
    assert choose_fusions(document) == chosen
    assert all(document.data["transformer"][name] is True for name in chosen)


def test_what_the_stand_in_lacks_is_refused_or_left_out() -> None:
    transformer = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4, fp4="e2m1")
    with pytest.raises(PlanError, match="features of Transformer Engine: fp4: do without"):
        check_supported(transformer, Layers.TRANSFORMER_ENGINE)
    check_supported(transformer, Layers.INSTALLED)
    document = Document.load("tiny", ["transformer.fine_grained_activation_offloading=true"])
    assert leave_out_offloading(document) == ["fine_grained_activation_offloading"]
    assert document.data["transformer"]["fine_grained_activation_offloading"] is False


def test_layers_follow_the_document() -> None:
    document = Document.load("tiny")
    assert choose_layers(document, None) is Layers.TRANSFORMER_ENGINE
    assert choose_layers(document, Layers.INSTALLED) is Layers.INSTALLED
    document.set("transformer.transformer_impl", "local")
    assert choose_layers(document, None) is Layers.PYTORCH


def test_a_process_with_other_layers_is_refused() -> None:
    with pytest.raises(PlanError, match=r'call prepare_process\(Layers\("transformer-engine"\)\)'):
        prepare_process(Layers.TRANSFORMER_ENGINE)
    options = PlanOptions(
        batch=Batch(seq_length=64, global_batch_size=1), world_size=1, layers=Layers.TRANSFORMER_ENGINE
    )
    with pytest.raises(PlanError, match="or plan in a new process"):
        plan(Document.load("tiny"), options)
