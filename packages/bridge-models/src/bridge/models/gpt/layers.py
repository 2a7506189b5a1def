"""Layer specs of a GPT: Transformer Engine's layers if they can be used, otherwise layers in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.models.backend.choice import (
    check_pytorch_support,
    check_transformer_engine_support,
    require_transformer_engine,
    uses_transformer_engine,
    wants_pytorch_attention,
)
from bridge.models.backend.provider import with_pytorch_attention, with_pytorch_layers
from bridge.models.backend.specs import LayerSpec, SpecT, resolve_layer_spec
from bridge.models.gpt.config import GPTModelConfig


def layer_spec(config: GPTModelConfig, *, vp_stage: int | None, pp_rank: int) -> LayerSpec:
    """Return the layer spec of one stage: the one from the configuration, or the default.

    Raises:
        UnsupportedError: The available layers do not support the configuration.
        LayerSpecError: The configuration's value is not a layer spec.
    """
    given = config.transformer_layer_spec
    if given is None:
        spec = default_layer_spec(config, vp_stage, pp_rank=pp_rank)
    else:
        spec = resolve_layer_spec(given, config, field="transformer_layer_spec", vp_stage=vp_stage)
    if wants_pytorch_attention(config.transformer):
        spec = with_pytorch_attention(spec)
    return spec


def default_layer_spec(config: GPTModelConfig, vp_stage: int | None = None, *, pp_rank: int | None = None) -> LayerSpec:
    """Return the default layer spec of one stage.

    It is the first of these that applies: inference-optimised, ModelOpt, experimental attention, mixture of experts,
    heterogeneous, Transformer Engine, PyTorch.

    Args:
        config: The model.
        vp_stage: Virtual pipeline stage, None without a virtual pipeline.
        pp_rank: Pipeline rank; None to take it from Megatron's global process groups.

    Raises:
        UnsupportedError: The available layers do not support the configuration.
    """
    transformer = config.transformer
    use_te = uses_transformer_engine(transformer)
    if transformer.transformer_impl == "inference_optimized":
        require_transformer_engine("transformer_impl: inference_optimized")
        return gpt_layer_specs.get_gpt_layer_with_inference_spec(
            transformer.qk_layernorm, transformer.multi_latent_attention, qk_l2_norm=transformer.qk_l2_norm
        )
    # ModelOpt's spec requires Transformer Engine. Without it, ModelOpt converts the layers in PyTorch.
    if config.restore_modelopt_state and use_te:
        return _modelopt_spec(config)
    if transformer.experimental_attention_variant is not None:
        require_transformer_engine(f"experimental_attention_variant: {transformer.experimental_attention_variant}")
        return get_transformer_block_with_experimental_attention_variant_spec(
            transformer, vp_stage=vp_stage, pp_rank=pp_rank
        )
    if use_te:
        check_transformer_engine_support(transformer)
        return _megatron_spec(transformer, use_te=True, vp_stage=vp_stage, pp_rank=pp_rank)
    check_pytorch_support(transformer)
    spec = _megatron_spec(transformer, use_te=False, vp_stage=vp_stage, pp_rank=pp_rank)
    if isinstance(spec, ModuleSpec):  # expand it as TransformerBlock does, but with torch's final norm
        layers = get_num_layers_to_build(transformer, vp_stage=vp_stage, pp_rank=pp_rank)
        spec = TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=WrappedTorchNorm)
    return _use_pytorch_layers(spec, transformer)


def _megatron_spec(
    transformer: TransformerConfig, *, use_te: bool, vp_stage: int | None, pp_rank: int | None
) -> LayerSpec:
    if transformer.num_moe_experts is not None:
        return gpt_layer_specs.get_gpt_decoder_block_spec(
            transformer,
            use_transformer_engine=use_te,
            normalization=transformer.normalization,
            qk_l2_norm=transformer.qk_l2_norm,
            vp_stage=vp_stage,
            pp_rank=pp_rank,
        )
    if isinstance(transformer, HeterogeneousTransformerConfig):
        block = get_gpt_heterogeneous_layer_spec(transformer, use_te, vp_stage=vp_stage, pp_rank=pp_rank)
        return cast(TransformerBlockSubmodules, block)
    return _plain_layer_spec(transformer)


def _use_pytorch_layers(spec: SpecT, transformer: TransformerConfig) -> SpecT:
    return with_pytorch_layers(spec, grouped_experts=transformer.moe_grouped_gemm)


def mtp_block_spec(
    config: GPTModelConfig, spec: LayerSpec, *, vp_stage: int | None, pp_rank: int
) -> MultiTokenPredictionBlockSubmodules | None:
    """Return the multi-token prediction block of one stage, or None if the stage has none.

    The block repeats the last layer of the decoder. If the configuration sets the layers, it repeats the last layer in
    ``spec``, which has the layers of this stage. On a stage without decoder layers, it uses the default layer.
    """
    transformer = config.transformer
    if not transformer.mtp_num_layers:
        return None
    use_te = uses_transformer_engine(transformer)
    if not use_te:
        check_pytorch_support(transformer)
    given = config.transformer_layer_spec is not None
    if isinstance(spec, TransformerBlockSubmodules) and not spec.layer_specs:
        layer = _plain_layer_spec(transformer)
    elif given:
        layer = spec if isinstance(spec, ModuleSpec) else cast(list[ModuleSpec], spec.layer_specs)[-1]
    else:
        layers = gpt_layer_specs.get_gpt_decoder_layer_specs(
            transformer,
            use_transformer_engine=use_te,
            normalization=transformer.normalization,
            qk_l2_norm=transformer.qk_l2_norm,
        )
        layer = cast(list[ModuleSpec], layers)[-1]  # megatron-core 0.19.2 annotates a block where it returns a list
    if wants_pytorch_attention(transformer):
        layer = with_pytorch_attention(layer)
    block: MultiTokenPredictionBlockSubmodules | None = gpt_layer_specs.get_gpt_mtp_block_spec(
        transformer,
        # In a block, because megatron-core 0.19.2 accepts a single ModuleSpec only of its own TransformerLayer.
        TransformerBlockSubmodules(layer_specs=[layer]),
        use_transformer_engine=use_te,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    if block is None or use_te:
        return block
    # A given layer stays as it is; only the block around it is replaced.
    block = _use_pytorch_layers(block, transformer)
    return _replace_layer(block, layer) if given else block


def _replace_layer(
    block: MultiTokenPredictionBlockSubmodules, layer: ModuleSpec
) -> MultiTokenPredictionBlockSubmodules:
    """Return a copy of a multi-token prediction block that uses ``layer`` at every depth."""
    depths: list[ModuleSpec] = block.layer_specs or []
    parts: list[Any] = [depth.submodules for depth in depths]
    return replace(
        block,
        layer_specs=[
            replace(depth, submodules=replace(part, mtp_model_layer=layer))
            for depth, part in zip(depths, parts, strict=True)
        ],
    )


def _plain_layer_spec(transformer: TransformerConfig) -> ModuleSpec:
    shared: dict[str, Any] = {
        "num_experts": transformer.num_moe_experts,
        "moe_grouped_gemm": transformer.moe_grouped_gemm,
        "qk_layernorm": transformer.qk_layernorm,
        "multi_latent_attention": transformer.multi_latent_attention,
        "qk_l2_norm": transformer.qk_l2_norm,
        "use_kitchen": transformer.use_kitchen,
        "use_kitchen_attention": transformer.use_kitchen_attention,
        "kitchen_attention_backend": transformer.kitchen_attention_backend,
    }
    if not uses_transformer_engine(transformer):
        return gpt_layer_specs.get_gpt_layer_local_spec(normalization=transformer.normalization, **shared)
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        use_te_op_fuser=transformer.use_transformer_engine_op_fuser,
        use_te_activation_func=transformer.use_te_activation_func,
        mla_down_proj_fusion=getattr(transformer, "mla_down_proj_fusion", False),
        use_grouped_gemm_for_dense_mlp=transformer.use_grouped_gemm_for_dense_mlp,
        **shared,
    )


def _modelopt_spec(config: GPTModelConfig) -> LayerSpec:
    # Imported here because it requires ModelOpt, which only models with a ModelOpt state need.
    from megatron.core.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec

    arbitrary_mask = config.use_arbitrary_attention_mask
    if arbitrary_mask is None:  # speculative decoding needs one; context parallelism supports only causal masks
        arbitrary_mask = config.transformer.context_parallel_size == 1
    return cast(
        LayerSpec,
        get_gpt_modelopt_spec(config.transformer, remap_te_layernorm=True, use_arbitrary_attention_mask=arbitrary_mask),
    )
