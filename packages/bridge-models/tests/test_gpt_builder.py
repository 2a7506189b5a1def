"""GPT models are built like those of megatron.training, whole and in pipeline stages."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelBuilder as MegatronGPTBuilder
from megatron.training.models.gpt import GPTModelConfig as MegatronGPTConfig
from ranks import run_ranks
from torch.nn.functional import silu

from bridge.config import ModelConfig
from bridge.dist import Layout, create_process_groups
from bridge.models.backend.attention import TorchAttention
from bridge.models.backend.experts import SequentialExperts
from bridge.models.backend.norms import TorchLayerNorm, TorchRMSNorm
from bridge.models.errors import ModelConfigError
from bridge.models.gpt import GPTModelBuilder, GPTModelConfig

GPT = Callable[..., GPTModelConfig]
Transformer = Callable[..., TransformerConfig]

MOE = {"num_moe_experts": 4, "moe_ffn_hidden_size": 24, "add_bias_linear": False}
LLAMA = {
    "normalization": "RMSNorm",
    "activation_func": silu,
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "num_query_groups": 2,
}
ROPE = {"position_embedding_type": "rope"}

# Class of the transformer, its fields, and the fields of the model.
MODELS: dict[str, tuple[type[TransformerConfig], dict[str, Any], dict[str, Any]]] = {
    "plain": (TransformerConfig, {}, {}),
    "tied": (TransformerConfig, {}, {"share_embeddings_and_output_weights": True}),
    "padded": (TransformerConfig, {}, {"should_pad_vocab": True, "make_vocab_size_divisible_by": 64}),
    "llama": (TransformerConfig, LLAMA, {**ROPE, "rope_scaling": True, "rotary_base": 500000, "rotary_percent": 0.5}),
    "bf16": (TransformerConfig, {**LLAMA, "bf16": True, "params_dtype": torch.bfloat16}, ROPE),
    "no positions": (TransformerConfig, {"add_qkv_bias": True}, {"position_embedding_type": "none"}),
    "query and key norms": (TransformerConfig, {"qk_layernorm": True}, {}),
    "experts": (TransformerConfig, MOE, {}),
    "experts in every other layer": (TransformerConfig, {**MOE, "moe_layer_freq": [0, 1, 0, 1]}, {}),
    "shared experts": (TransformerConfig, {**MOE, "moe_shared_expert_intermediate_size": 16}, {}),
    "heterogeneous": (HeterogeneousTransformerConfig, {}, {}),
    "multi-token prediction": (TransformerConfig, {"mtp_num_layers": 1}, {}),
    "multi-token prediction, experts": (
        TransformerConfig,
        {**MOE, "mtp_num_layers": 1, "moe_layer_freq": [1, 1, 1, 0]},
        {"position_embedding_type": "rope"},
    ),
    "heterogeneous with experts": (HeterogeneousTransformerConfig, MOE, {}),
    "local attention": (TransformerConfig, {"attention_backend": AttnBackend.local}, {}),
}


@pytest.mark.parametrize("model", MODELS)
def test_the_model_equals_that_of_megatron_training(
    pg_collection: ProcessGroupCollection, transformer: Transformer, model: str
) -> None:
    cls, inner, outer = MODELS[model]
    outer = {"vocab_size": 96, "seq_length": 16} | outer
    local = transformer(cls, transformer_impl="local", **inner)
    megatron_model = build_seeded(
        lambda: MegatronGPTBuilder(MegatronGPTConfig(transformer=local, **outer)).build_model(pg_collection)
    )
    config = GPTModelConfig(transformer=transformer(cls, transformer_impl="local", **inner), **outer)
    bridge_model = build_seeded(lambda: GPTModelBuilder(config).build_model(pg_collection))
    assert parameter_values(bridge_model) == parameter_values(megatron_model)
    replaced_by: dict[type, type] = {
        TorchAttention: DotProductAttention,
        TorchLayerNorm: torch.nn.LayerNorm,
        TorchRMSNorm: torch.nn.RMSNorm,
        SequentialExperts: SequentialMLP,
    }
    kinds = [replaced_by.get(type(module), type(module)) for module in bridge_model.modules()]
    assert kinds == [type(module) for module in megatron_model.modules()]


@pytest.mark.parametrize("model", MODELS)
def test_building_twice_gives_equal_models_and_keeps_the_config(
    pg_collection: ProcessGroupCollection, gpt: GPT, model: str
) -> None:
    cls, inner, outer = MODELS[model]
    config = gpt(cls, outer=outer, **inner)
    before = repr(config)
    builder = GPTModelBuilder(config)
    first, second = (build_seeded(lambda: builder.build_model(pg_collection)) for _ in range(2))
    assert parameter_values(first) == parameter_values(second)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert repr(config) == before


@pytest.mark.parametrize("model", MODELS)
def test_a_config_read_back_builds_the_same_model(pg_collection: ProcessGroupCollection, gpt: GPT, model: str) -> None:
    cls, inner, outer = MODELS[model]
    config = gpt(cls, outer=outer, **inner)
    read = ModelConfig.from_dict(json.loads(json.dumps(config.as_dict())))
    assert type(read) is GPTModelConfig
    assert type(read.transformer) is cls
    assert read.as_dict() == config.as_dict()
    assert repr(read) == repr(config)
    first = build_seeded(lambda: GPTModelBuilder(config).build_model(pg_collection))
    second = build_seeded(lambda: GPTModelBuilder(read).build_model(pg_collection))
    assert parameter_values(first) == parameter_values(second)


def test_outer_fields_are_passed_to_the_model(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    outer = {
        "vocab_size": 100,
        "should_pad_vocab": True,
        "make_vocab_size_divisible_by": 32,
        "seq_length": 24,
        "fp16_lm_cross_entropy": True,
        "parallel_output": False,
        "share_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
        "rotary_percent": 0.5,
        "rotary_base": 5000,
        "rope_scaling": True,
        "seq_len_interpolation_factor": 2.0,
    }
    model = GPTModelBuilder(gpt(outer=outer)).build_model(pg_collection)
    assert model.vocab_size == 128
    assert model.max_sequence_length == 24
    assert model.fp16_lm_cross_entropy
    assert not model.parallel_output
    assert model.share_embeddings_and_output_weights
    assert model.rotary_scaling
    # 8 channels per head, half of them rotated: two pairs, with frequencies 1 and 5000 ** -1/2.
    assert model.rotary_pos_emb.inv_freq.shape == (2,)
    assert model.rotary_pos_emb.inv_freq[0] == 1.0
    assert model.rotary_pos_emb.seq_len_interpolation_factor == 2.0


@pytest.mark.parametrize(("pre", "post"), [(False, False), (False, True), (True, False), (True, True)])
def test_explicit_pre_and_post_process_are_used(
    pg_collection: ProcessGroupCollection, gpt: GPT, pre: bool, post: bool
) -> None:
    model = GPTModelBuilder(gpt()).build_model(pg_collection, pre_process=pre, post_process=post)
    assert (model.pre_process, model.post_process) == (pre, post)
    names = {name for name, _ in model.named_parameters()}
    assert ("embedding.word_embeddings.weight" in names) == pre
    assert ("output_layer.weight" in names) == post


def test_one_stage_is_first_and_last(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    model = GPTModelBuilder(gpt()).build_model(pg_collection)
    assert (model.pre_process, model.post_process) == (True, True)


def test_one_pipeline_rank_has_no_virtual_stages(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    model = GPTModelBuilder(gpt(virtual_pipeline_model_parallel_size=3)).build_model(pg_collection)
    assert (model.pre_process, model.post_process) == (True, True)
    assert len(model.decoder.layers) == 4


@pytest.mark.parametrize(
    ("vp", "vp_stage", "message"),
    [
        (None, 1, "no virtual pipeline"),
        (2, None, "pass a number from 0 to 1"),
        (2, 2, "pass a number from 0 to 1"),
        (2, -1, "pass a number from 0 to 1"),
    ],
)
def test_a_missing_virtual_stage_is_an_error(
    pg_collection: ProcessGroupCollection, gpt: GPT, vp: int | None, vp_stage: int | None, message: str
) -> None:
    config = gpt(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=vp, pipeline_dtype=torch.float32)
    with pytest.raises(ModelConfigError, match=message):
        GPTModelBuilder(config).build_model(pg_collection, vp_stage=vp_stage)


def test_a_missing_vocabulary_size_is_an_error(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    with pytest.raises(ModelConfigError, match="vocab_size is not set"):
        GPTModelBuilder(gpt(outer={"vocab_size": None})).build_model(pg_collection)


Stage = tuple[bool, bool, list[tuple[int, str]], bool]


@pytest.mark.parametrize("model", ["experts in every other layer", "heterogeneous", "multi-token prediction, experts"])
def test_stages_of_a_pipeline_make_up_the_model(pg_collection: ProcessGroupCollection, gpt: GPT, model: str) -> None:
    """The stages of two ranks with two virtual stages each have all layers of the model, in order."""
    cls, inner, outer = MODELS[model]
    whole = GPTModelBuilder(gpt(cls, outer=outer, **inner)).build_model(pg_collection)
    split = {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "pipeline_dtype": torch.float32,
    }
    ranks = run_ranks(build_stages, 2, gpt(cls, outer=outer, **split, **inner))
    in_order = [ranks[pp_rank][vp_stage] for vp_stage in range(2) for pp_rank in range(2)]
    assert [(pre, post) for pre, post, _, _ in in_order] == [
        (True, False),
        (False, False),
        (False, False),
        (False, True),
    ]
    assert [layer for _, _, layers, _ in in_order for layer in layers] == layer_descriptions(whole)
    assert [mtp for _, _, _, mtp in in_order] == [False, False, False, hasattr(whole, "mtp")]


def build_stages(config: GPTModelConfig) -> list[Stage]:
    groups = create_process_groups(Layout(pp=2, vp=2))
    stages = [GPTModelBuilder(config).build_model(groups, vp_stage=vp_stage) for vp_stage in range(2)]
    return [
        (stage.pre_process, stage.post_process, layer_descriptions(stage), hasattr(stage, "mtp")) for stage in stages
    ]


def layer_descriptions(model: GPTModel) -> list[tuple[int, str]]:
    """Return the number of each layer with the names and shapes of its parameters."""
    layers: Any = model.decoder.layers
    return [
        (layer.layer_number, str([(name, tuple(p.shape)) for name, p in layer.named_parameters()])) for layer in layers
    ]


def build_seeded(build: Callable[[], GPTModel]) -> GPTModel:
    """Build a model from a fixed random state."""
    torch.manual_seed(1234)
    return build()


def parameter_values(model: GPTModel) -> dict[str, tuple[torch.dtype, list[Any]]]:
    """Return the dtype and the values of every parameter by name."""
    return {name: (p.dtype, p.tolist()) for name, p in model.named_parameters()}
