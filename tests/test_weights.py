"""Parameters split by tensor parallelism are marked; random weights depend only on their full names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed, set_tensor_model_parallel_attributes
from megatron.core.transformer import MegatronModule, TransformerConfig
from quantized_parameters import quantize
from ranks import run_ranks

from bridge.config import Document
from bridge.dist import Layout, create_process_groups
from bridge.dist.cpu import cpu_runtime, on_meta
from bridge.dist.document_layout import apply_layout
from bridge.dist.engine.placement import Placement, named_parameters
from bridge.dist.engine.stages import build_stages
from bridge.dist.engine.weights import draw_weights
from bridge.dist.job import make_builder
from bridge.dist.plan.virtual_rank.groups import act_as_rank
from bridge.models import presets

PRESETS = sorted(file.stem for file in Path(presets.__path__[0]).glob("*.yaml"))
LATENT = "transformer._target_=megatron.core.transformer.transformer_config.MLATransformerConfig"
OPTIONS = {
    "plain": ("tiny",),
    "attention sinks": ("tiny", "transformer.softmax_type=learnable"),
    "softmax off by one": ("tiny", "transformer.softmax_type=off-by-one"),
    "attention sinks, experts": ("moe-tiny", "transformer.softmax_type=learnable"),
    "attention sinks, hybrid": ("hybrid-tiny", "transformer.softmax_type=learnable"),
    "QKV biases": (
        "tiny",
        "transformer.add_bias_linear=false",
        "transformer.add_qkv_bias=true",
    ),
    "gates, grouped queries": ("tiny", "transformer.gated_linear_unit=true", "transformer.num_query_groups=2"),
    "one query group for two ranks": ("tiny", "transformer.num_query_groups=1"),
    "attention output gates": ("tiny", "transformer.attention_output_gate=true"),
    "query and key norms": ("tiny", "transformer.qk_layernorm=true"),
    "RMSNorm": ("tiny", "transformer.normalization=RMSNorm", "transformer.layernorm_zero_centered_gamma=true"),
    "tied embeddings": ("tiny", "share_embeddings_and_output_weights=true"),
    "padded vocabulary": ("tiny", "vocab_size=250"),
    "multi-token prediction": ("tiny", "position_embedding_type=rope", "transformer.mtp_num_layers=1"),
    "other head and MLP sizes": ("tiny", "transformer.kv_channels=8", "transformer.ffn_hidden_size=96"),
    "biases of experts": (
        "moe-tiny",
        "transformer.add_bias_linear=true",
        "transformer.bias_dropout_fusion=false",
        "transformer.expert_tensor_parallel_size=1",
    ),
    "sequential experts": ("moe-tiny", "transformer.moe_grouped_gemm=false"),
    "experts without tensor parallelism": ("moe-tiny", "transformer.expert_tensor_parallel_size=1"),
    "sequential experts without tensor parallelism": (
        "moe-tiny",
        "transformer.moe_grouped_gemm=false",
        "transformer.expert_tensor_parallel_size=1",
    ),
    "shared experts": ("moe-tiny", "transformer.moe_shared_expert_intermediate_size=64"),
    "shared experts with gates": (
        "moe-tiny",
        "transformer.moe_shared_expert_intermediate_size=64",
        "transformer.moe_shared_expert_gate=true",
    ),
    "expert biases in the router": (
        "moe-tiny",
        "transformer.moe_router_score_function=sigmoid",
        "transformer.moe_router_enable_expert_bias=true",
    ),
    "experts in some layers": ("moe-tiny", "transformer.moe_layer_freq=[0,1,1,0]"),
    "latent attention": ("mla-tiny",),
    "latent attention without latent queries": ("mla-tiny", "transformer.q_lora_rank=null"),
    "hybrid": ("hybrid-tiny",),
    "Mamba": ("mamba-tiny",),
    "T5, relative positions": ("t5-tiny",),
    "T5, learned positions": ("t5-tiny", "position_embedding_type=learned_absolute"),
    "T5, gates and biases": ("t5-tiny", "transformer.gated_linear_unit=true", "transformer.add_bias_linear=true"),
}


def load_shrunk(name: str) -> Document:
    """Return a preset with one layer of each kind and a few experts; sizes of layers do not change."""
    document = Document.load(name)
    transformer = document.data["transformer"]
    pattern = document.data.get("hybrid_layer_pattern")
    if pattern is None:
        document.set("transformer.num_layers", 2)
        if "moe_layer_freq" in transformer:
            document.set("transformer.moe_layer_freq", [0, 1])
    else:
        kinds = "".join(dict.fromkeys(pattern))
        document.set("hybrid_layer_pattern", kinds)
        document.set("transformer.num_layers", len(kinds))
    if transformer.get("mamba_num_groups") == 1:  # one group cannot be split
        document.set("transformer.mamba_num_groups", 2)
    if "num_moe_experts" in transformer:
        document.set("transformer.num_moe_experts", 4)
        document.set("transformer.moe_router_topk", 2)
        if transformer.get("add_bias_linear"):
            document.set(
                "transformer.expert_tensor_parallel_size", 1
            )  # Megatron's experts support biases only with this size
        for field in ("moe_router_num_groups", "moe_router_group_topk"):
            if field in transformer:
                document.remove(f"transformer.{field}")
    return document


@contextmanager
def build_rank(
    document: Document, *, rank: int = 0, **sizes: int
) -> Iterator[tuple[MegatronModule, ProcessGroupCollection]]:
    """Build the stage of one rank of a layout; yield the stage and its groups."""
    apply_layout(document, sizes)
    builder = make_builder(document.config())
    layout = Layout.of(builder.transformer_config, math.prod(sizes.values()))
    with act_as_rank(layout, rank) as groups:
        model_parallel_cuda_manual_seed(torch.initial_seed(), force_reset_rng=True)
        (stage,) = build_stages(builder.build_model, groups, vp_size=None)
        yield stage, groups


def find_placements(document: Document, *, tp: int) -> dict[str, Placement]:
    with on_meta(), build_rank(document, tp=tp) as (stage, groups):
        return {named.placement.full_name: named.placement for named in named_parameters(stage, groups)}


def check_marks(one: Document, several: Document, *, tp: int = 2) -> None:
    """Check that exactly the parameters split by tensor parallelism have Megatron's attributes."""
    whole, split = find_placements(one, tp=1), find_placements(several, tp=tp)
    assert whole.keys() == split.keys()
    differ = {name for name in whole if whole[name].shape != split[name].shape}
    assert differ == {name for name, placement in split.items() if placement.shards > 1}
    vocab = one.data["vocab_size"]
    shapes, joined = (
        {name: placement.logical_shape(vocab) for name, placement in found.items()} for found in (whole, split)
    )
    assert joined == shapes


@pytest.mark.parametrize("name", PRESETS)
def test_presets_mark_their_split_parameters(name: str) -> None:
    check_marks(load_shrunk(name), load_shrunk(name), tp=5 if name == "gpt2-xl" else 2)  # gpt2-xl has 25 heads


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layers_mark_their_split_parameters(options: tuple[str, ...]) -> None:
    name, *overrides = options
    check_marks(Document.load(name, overrides), Document.load(name, overrides))


def test_gpt_oss_20b_has_its_published_number_of_parameters() -> None:
    """The number of elements of the published weights."""
    sizes = find_placements(Document.load("gpt-oss-20b", ["transformer.expert_tensor_parallel_size=1"]), tp=2)
    assert sum(placement.logical_shape(201088).numel() for placement in sizes.values()) == 20_914_757_184


def test_the_optimizer_of_parameters_in_fp8_starts_from_what_is_drawn() -> None:
    """Transformer Engine keeps what it drew itself, which depends on the layout."""
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    with cpu_runtime(), build_rank(Document.load("tiny"), tp=1) as (stage, groups):
        draw_weights([stage], groups, vocab_size=None)
        drawn = stage.get_parameter(name).detach().clone()
        torch.nn.init.zeros_(stage.get_parameter(name))
        parameter: Any = quantize(stage.get_submodule(name.rpartition(".")[0]), "weight")
        draw_weights([stage], groups, vocab_size=None)
    assert torch.equal(parameter.get_high_precision_init_val(), drawn)
    assert torch.equal(parameter.float(), drawn.to(torch.float8_e4m3fn).float())


Weights = dict[str, torch.Tensor]


def weights(stage: MegatronModule, groups: ProcessGroupCollection) -> Weights:
    return {named.placement.full_name: named.parameter.detach().clone() for named in named_parameters(stage, groups)}


def weights_before_and_after(document: Document, *, seed: int) -> tuple[Weights, Weights]:
    """Build a whole model from a seed; return its weights before and after initialisation by name."""
    torch.manual_seed(seed)
    with cpu_runtime(), build_rank(document, tp=1) as (stage, groups):
        before = weights(stage, groups)
        draw_weights([stage], groups, vocab_size=document.data["vocab_size"])
        return before, weights(stage, groups)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_random_weights_are_initialised_by_name(options: tuple[str, ...]) -> None:
    name, *overrides = options
    (one, drawn), (two, again) = (
        weights_before_and_after(Document.load(name, overrides), seed=seed) for seed in (1, 2)
    )
    random = {name for name in one if not torch.equal(one[name], two[name])}
    for name, weight in drawn.items():
        assert torch.equal(weight, again[name]), name
        assert torch.equal(weight, one[name]) != (name in random), name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_rank_initialises_its_part_of_the_same_weights(options: tuple[str, ...]) -> None:
    name, *overrides = options
    _, drawn = weights_before_and_after(Document.load(name, overrides), seed=1)
    document = Document.load(name, overrides)
    vocab = document.data["vocab_size"]
    torch.manual_seed(2)
    with cpu_runtime(), build_rank(document, rank=1, tp=2) as (stage, groups):
        draw_weights([stage], groups, vocab_size=vocab)
        for placement, parameter, _ in named_parameters(stage, groups):
            whole = drawn[placement.full_name][: placement.logical_shape(vocab)[0]]
            assert torch.equal(parameter, placement.take_shard(placement.pad(whole))), placement.full_name


class OwnLayers(MegatronModule):
    """A module without Megatron's layers: a linear layer of torch and vectors, one of them split over ranks."""

    def __init__(self, config: TransformerConfig, *, rank: int, ranks: int) -> None:
        super().__init__(config)
        self.linear = torch.nn.Linear(100, 1)
        self.whole = torch.nn.Parameter(torch.rand(4))
        self.split = torch.nn.Parameter(torch.tensor([0.25, 0.75]).chunk(ranks)[rank].clone())
        self.norm = torch.nn.LayerNorm(8)
        self.scale = torch.nn.Parameter(torch.tensor(3.0))
        set_tensor_model_parallel_attributes(self.split, is_parallel=True, dim=0, stride=1)


def draw_own_layers() -> dict[str, list[float]]:
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, tensor_model_parallel_size=ranks, init_method_std=5.0
    )
    groups = create_process_groups(Layout(tp=ranks))
    torch.manual_seed(10 * ranks + rank)
    stage = OwnLayers(config, rank=rank, ranks=ranks)
    draw_weights([stage], groups, vocab_size=None)
    return {name: parameter.flatten().tolist() for name, parameter in stage.named_parameters()}


def test_layers_outside_megatron_are_initialised_by_name() -> None:
    (whole,) = run_ranks(draw_own_layers, 1)
    first, second = run_ranks(draw_own_layers, 2)
    split = first.pop("split") + second.pop("split")
    assert split == whole.pop("split") != [0.25, 0.75]
    assert first == second == whole
    assert 0 < abs(whole["linear.bias"][0]) <= 0.1  # 1 / sqrt(100 inputs)
    assert max(map(abs, whole["whole"])) > 1
    assert (whole["norm.weight"], whole["norm.bias"], whole["scale"]) == ([1.0] * 8, [0.0] * 8, [3.0])
