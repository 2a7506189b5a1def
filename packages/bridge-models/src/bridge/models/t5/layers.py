"""Layer specs of a T5: Transformer Engine's layers if they can be used, otherwise layers in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.models.T5 import t5_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.models.backend.choice import (
    Limitations,
    check_limitations,
    check_pytorch_support,
    uses_transformer_engine,
    wants_pytorch_attention,
)
from bridge.models.backend.provider import with_pytorch_attention, with_pytorch_layers
from bridge.models.backend.specs import LayerSpec, resolve_layer_spec
from bridge.models.t5.config import T5ModelConfig


@dataclass(frozen=True, kw_only=True)
class _MegatronSpecs:
    """Megatron's spec functions for one stack: a Transformer Engine block of N layers, and one local layer."""

    transformer_engine: Callable[[int], TransformerBlockSubmodules]
    local: Callable[[], ModuleSpec]


_ENCODER = _MegatronSpecs(
    transformer_engine=t5_spec.get_t5_encoder_with_transformer_engine_block_spec,
    local=t5_spec.encoder_model_with_local_spec,
)
_DECODER = _MegatronSpecs(
    transformer_engine=t5_spec.get_t5_decoder_with_transformer_engine_block_spec,
    local=t5_spec.decoder_model_with_local_spec,
)

# The T5 specs of megatron-core 0.19.2 silently ignore these.
_SPEC_LIMITATIONS: Limitations = {
    "experts": (lambda c: c.num_moe_experts is not None, "set transformer.num_moe_experts to null"),
    "multi-latent attention": (lambda c: c.multi_latent_attention, "embed a plain TransformerConfig"),
    "normalisation of queries and keys": (
        lambda c: c.qk_layernorm or c.qk_l2_norm,
        "set transformer.qk_layernorm and transformer.qk_l2_norm to false",
    ),
    "experimental attention": (
        lambda c: c.experimental_attention_variant is not None,
        "set transformer.experimental_attention_variant to null",
    ),
    "heterogeneous blocks": (
        lambda c: c.heterogeneous_block_specs,
        "embed a plain TransformerConfig",
    ),
    "sliding-window attention": (lambda c: c.window_size is not None, "set transformer.window_size to null"),
    "Kitchen quantization": (lambda c: c.use_kitchen, "set transformer.use_kitchen to false"),
    "transformer_impl: inference_optimized": (
        lambda c: c.transformer_impl == "inference_optimized",
        "set transformer.transformer_impl to transformer_engine or local",
    ),
    "fused operations of Transformer Engine": (
        lambda c: c.use_transformer_engine_op_fuser or c.use_grouped_gemm_for_dense_mlp or c.fused_residual_rmsnorm,
        "set transformer.use_transformer_engine_op_fuser, use_grouped_gemm_for_dense_mlp and fused_residual_rmsnorm "
        "to false",
    ),
}


def encoder_layer_spec(config: T5ModelConfig) -> LayerSpec:
    """Return the layer spec of the encoder: the one from the configuration, or the default.

    Raises:
        UnsupportedError: The available layers do not support the configuration.
        LayerSpecError: The configuration's value is not a layer spec.
    """
    if config.encoder_layer_spec is None:
        return _default_spec(config.encoder_transformer, _ENCODER)
    return _resolve_spec(config.encoder_layer_spec, config, field="encoder_layer_spec")


def decoder_layer_spec(config: T5ModelConfig) -> LayerSpec:
    """Return the layer spec of the decoder: the one from the configuration, or the default.

    Raises:
        UnsupportedError: The available layers do not support the configuration.
        LayerSpecError: The configuration's value is not a layer spec.
    """
    if config.decoder_layer_spec is None:
        return _default_spec(config.transformer, _DECODER)
    return _resolve_spec(config.decoder_layer_spec, config, field="decoder_layer_spec")


def _resolve_spec(
    given: LayerSpec | Callable[[T5ModelConfig], ModuleSpec], config: T5ModelConfig, *, field: str
) -> LayerSpec:
    spec = resolve_layer_spec(given, config, field=field)
    return with_pytorch_attention(spec) if wants_pytorch_attention(config.transformer) else spec


def _default_spec(transformer: TransformerConfig, megatron: _MegatronSpecs) -> LayerSpec:
    check_limitations(transformer, _SPEC_LIMITATIONS, layers="Megatron's layers for T5")
    if uses_transformer_engine(transformer):
        spec = megatron.transformer_engine(transformer.num_layers)
        return with_pytorch_attention(spec) if wants_pytorch_attention(transformer) else spec
    check_pytorch_support(transformer)
    # The local block spec of megatron-core 0.19.2 uses Transformer Engine's final norm, which is None without it.
    block = TransformerBlockSubmodules(
        layer_specs=[megatron.local()] * transformer.num_layers, layer_norm=WrappedTorchNorm
    )
    return with_pytorch_layers(block)
