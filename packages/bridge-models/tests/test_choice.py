"""The choice between layers of Transformer Engine and PyTorch, and features that neither supports."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.training.models.gpt import GPTModelBuilder as MegatronGPTBuilder
from megatron.training.models.gpt import GPTModelConfig as MegatronGPTConfig

from bridge.dist.cpu import cpu_runtime
from bridge.models.backend import choice
from bridge.models.backend.attention import TorchAttention
from bridge.models.backend.provider import with_pytorch_layers
from bridge.models.errors import UnsupportedError
from bridge.models.gpt import GPTModelBuilder, GPTModelConfig

GPT = Callable[..., GPTModelConfig]

Transformer = Callable[..., TransformerConfig]

without_te = pytest.mark.skipif(HAVE_TE, reason="says what happens where Transformer Engine is not installed")


def attention_classes(config: GPTModelConfig, pg_collection: ProcessGroupCollection) -> list[type]:
    model: Any = GPTModelBuilder(config).build_model(pg_collection)
    return [type(layer.self_attention.core_attention) for layer in model.decoder.layers]


def test_pytorch_layers_require_grouped_experts_only_with_experts() -> None:
    dense = get_gpt_layer_local_spec()
    assert repr(with_pytorch_layers(dense)) == repr(with_pytorch_layers(dense, grouped_experts=True)) != repr(dense)
    with pytest.raises(UnsupportedError, match=r"pass grouped_experts=config\.moe_grouped_gemm"):
        with_pytorch_layers(get_gpt_layer_local_spec(num_experts=2))


@without_te
def test_the_fallback_to_pytorch_layers_is_logged_once(
    pg_collection: ProcessGroupCollection, gpt: GPT, caplog: pytest.LogCaptureFixture
) -> None:
    choice.report_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, logger="bridge.models.backend.choice"):
        GPTModelBuilder(gpt(transformer_impl="local")).build_model(pg_collection)
        assert not [record for record in caplog.records if record.name == "bridge.models.backend.choice"]
        for _ in range(2):
            GPTModelBuilder(gpt(mtp_num_layers=1)).build_model(pg_collection)
    said = [record.getMessage() for record in caplog.records if record.name == "bridge.models.backend.choice"]
    assert len(said) == 1
    assert "Transformer Engine is not installed" in said[0]


# Features that megatron-core 0.19.2 lacks in local layers and Bridge has in PyTorch layers.
ONLY_PYTORCH_LAYERS: dict[str, tuple[type[TransformerConfig], dict[str, Any]]] = {
    "sequence parallelism": (TransformerConfig, {"sequence_parallel": True, "tensor_model_parallel_size": 2}),
    "context parallelism": (TransformerConfig, {"context_parallel_size": 2}),
    "multi-latent attention": (MLATransformerConfig, {}),
    "latents of keys and values alone": (MLATransformerConfig, {"q_lora_rank": None, "qk_layernorm": True}),
    "zero-centered norms": (TransformerConfig, {"layernorm_zero_centered_gamma": True}),
}

# Features that both lack, with the message of the error. A test below fails when local layers gain one.
UNSUPPORTED: dict[str, tuple[type[TransformerConfig], dict[str, Any], str]] = {
    "persistent norms": (TransformerConfig, {"persist_layer_norm": True}, r"persist_layer_norm to false"),
    "saving norms": (TransformerConfig, {"memory_efficient_layer_norm": True}, r"memory_efficient_layer_norm to false"),
    "latent experts": (
        TransformerConfig,
        {"num_moe_experts": 2, "moe_latent_size": 8, "add_bias_linear": False},
        r"moe_latent_size to null",
    ),
    "offloaded layers": (
        TransformerConfig,
        {"cpu_offloading": True, "cpu_offloading_num_layers": 1},
        r"cpu_offloading and",
    ),
    "fused gradients": (
        TransformerConfig,
        {"gradient_accumulation_fusion": True},
        r"gradient_accumulation_fusion to false",
    ),
}

# Features with which both can be built but not trained.
UNTRAINABLE: dict[str, tuple[type[TransformerConfig], dict[str, Any], str]] = {
    "offloaded inputs": (
        TransformerConfig,
        {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn"]},
        r"fine_grained_activation_offloading to false",
    ),
    "recomputed norms": (
        TransformerConfig,
        {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
        r"layernorm and moe_act from transformer.recompute_modules",
    ),
    "single experts with biases": (
        TransformerConfig,
        {"num_moe_experts": 4, "add_bias_linear": True},
        r"moe_grouped_gemm to true or transformer.add_bias_linear to false",
    ),
}


@without_te
@pytest.mark.parametrize("case", ONLY_PYTORCH_LAYERS)
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_features_missing_from_local_layers_are_built(
    pg_collection: ProcessGroupCollection, gpt: GPT, case: str, implementation: str
) -> None:
    cls, inner = ONLY_PYTORCH_LAYERS[case]
    config = gpt(cls, transformer_impl=implementation, **inner)
    with cpu_runtime():  # the rotary embedding of multi-latent attention is created on the GPU
        assert attention_classes(config, pg_collection) == [TorchAttention] * 4


@without_te
@pytest.mark.parametrize("case", [*UNSUPPORTED, *UNTRAINABLE])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_features_missing_from_pytorch_layers_are_refused(
    pg_collection: ProcessGroupCollection, gpt: GPT, case: str, implementation: str
) -> None:
    cls, inner, message = (UNSUPPORTED | UNTRAINABLE)[case]
    with pytest.raises(UnsupportedError, match=message):
        GPTModelBuilder(gpt(cls, transformer_impl=implementation, **inner)).build_model(pg_collection)


@without_te
@pytest.mark.parametrize("case", [*ONLY_PYTORCH_LAYERS, *UNSUPPORTED])
def test_local_layers_still_lack_these_features(
    pg_collection: ProcessGroupCollection, transformer: Transformer, case: str
) -> None:
    cls, inner, *_ = ONLY_PYTORCH_LAYERS.get(case) or UNSUPPORTED[case]
    config = MegatronGPTConfig(transformer=transformer(cls, transformer_impl="local", **inner), vocab_size=96)
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        MegatronGPTBuilder(config).build_model(pg_collection)


@without_te
@pytest.mark.parametrize("case", UNTRAINABLE)
def test_local_layers_still_cannot_train_these_features(
    pg_collection: ProcessGroupCollection, transformer: Transformer, case: str
) -> None:
    cls, inner, _ = UNTRAINABLE[case]
    config = MegatronGPTConfig(transformer=transformer(cls, transformer_impl="local", **inner), vocab_size=96)
    with cpu_runtime():
        model_parallel_cuda_manual_seed(1)  # the token dispatcher uses these random states
        model = MegatronGPTBuilder(config).build_model(pg_collection)
        tokens = torch.arange(8)[None]
        mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
        with pytest.raises((NameError, RuntimeError)):
            model(tokens, tokens, mask, labels=tokens).mean().backward()


@without_te
def test_all_unsupported_features_are_reported_together(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    config = gpt(persist_layer_norm=True, fp8="e4m3", masked_softmax_fusion=True, bf16=True)
    with pytest.raises(UnsupportedError, match=r"(?s)persist_layer_norm.*fp8.*masked_softmax_fusion"):
        GPTModelBuilder(config).build_model(pg_collection)


def test_fused_softmax_is_ignored_in_fp32(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    GPTModelBuilder(gpt(masked_softmax_fusion=True)).build_model(pg_collection)


@without_te
@pytest.mark.parametrize(
    ("inner", "named"),
    [
        (
            {
                "transformer_impl": "inference_optimized",
                "normalization": "RMSNorm",
                "add_bias_linear": False,
            },
            "inference_optimized",
        ),
        (
            {
                "experimental_attention_variant": "gated_delta_net",
                "linear_attention_freq": 2,
                "num_moe_experts": 2,
                "moe_ffn_hidden_size": 16,
                "add_bias_linear": False,
            },
            "gated_delta_net",
        ),
    ],
)
def test_features_that_need_transformer_engine_are_refused_without_it(
    pg_collection: ProcessGroupCollection, gpt: GPT, inner: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"{named} requires Transformer Engine"):
        GPTModelBuilder(gpt(**inner)).build_model(pg_collection)
