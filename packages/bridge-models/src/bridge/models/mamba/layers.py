"""Layer specs of a hybrid model: Transformer Engine's layers if they can be used, otherwise layers in PyTorch."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_mlp_module_spec_for_backend
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from bridge.config.schema.hybrid_pattern import count_prediction_depths
from bridge.models.backend.choice import (
    check_pytorch_support,
    require_transformer_engine,
    uses_transformer_engine,
    wants_pytorch_attention,
)
from bridge.models.backend.mixer import local_mixer_spec, replace_mixers
from bridge.models.backend.norms import fused_norm, torch_norm
from bridge.models.backend.provider import PyTorchSpecProvider, with_pytorch_attention, with_pytorch_layers
from bridge.models.backend.specs import resolve_spec
from bridge.models.mamba.config import MambaModelConfig
from bridge.models.mamba.pattern import refuse_layers

_NEED_TRANSFORMER_ENGINE = "+DG"  # symbols of `hybrid_layer_pattern` whose layers exist only there


def stack_spec(config: MambaModelConfig) -> ModuleSpec:
    """Return the stack spec of a model: the one from the configuration, or the default.

    Raises:
        UnsupportedError: The available layers do not support the configuration.
        LayerSpecError: The configuration's value is not a spec.
    """
    given = config.hybrid_stack_spec
    if given is None:
        spec = default_stack_spec(config)
    else:
        spec = resolve_spec(given, config, field="hybrid_stack_spec", kinds=(ModuleSpec,))
    if wants_pytorch_attention(config.transformer):
        spec = with_pytorch_attention(spec)
    return replace_mixers(spec)


def default_stack_spec(config: MambaModelConfig) -> ModuleSpec:
    """Return the default stack spec.

    It is the first of these that applies: inference-optimised, ModelOpt, Transformer Engine, PyTorch.

    Raises:
        UnsupportedError: The available layers do not support the configuration.
    """
    transformer = config.transformer
    if transformer.transformer_impl == "inference_optimized":
        require_transformer_engine("transformer_impl: inference_optimized")
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_inference_stack_spec

        return hybrid_inference_stack_spec
    if uses_transformer_engine(transformer):
        if config.restore_modelopt_state:
            return _modelopt_spec()
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

        return hybrid_stack_spec
    check_pytorch_support(transformer)
    refuse_layers(config.layer_pattern, _NEED_TRANSFORMER_ENGINE, "they require Transformer Engine: install it")
    if count_prediction_depths(config.layer_pattern):
        require_transformer_engine("multi-token prediction of a hybrid model")
    return pytorch_stack_spec(transformer)


def _modelopt_spec() -> ModuleSpec:
    # Imported here because it requires ModelOpt, which only models with a ModelOpt state need.
    from megatron.core.post_training.modelopt.hybrid.model_specs import get_hybrid_stack_modelopt_spec

    return get_hybrid_stack_modelopt_spec(local_core_attention=False, remap_te_layernorm=False)


def pytorch_stack_spec(transformer: TransformerConfig) -> ModuleSpec:
    """Return the stack spec of layers in PyTorch, with the checkpoint keys of Transformer Engine's layers."""
    # A GPT layer is attention plus MLP. In a hybrid model, each of them is a layer: the other one becomes an identity.
    whole = get_gpt_layer_local_spec(
        normalization=transformer.normalization,
        qk_layernorm=transformer.qk_layernorm,
        qk_l2_norm=transformer.qk_l2_norm,
    )
    parts = cast(TransformerLayerSubmodules, whole.submodules)
    attention = dataclasses.replace(parts, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp)
    mlp = dataclasses.replace(
        parts, input_layernorm=IdentityOp, self_attention=IdentityOp, self_attn_bda=IdentityFuncOp
    )
    experts = dataclasses.replace(
        mlp,
        mlp=get_mlp_module_spec_for_backend(
            PyTorchSpecProvider(),
            num_experts=transformer.num_moe_experts or 1,  # any number: the spec exists without experts too
            moe_grouped_gemm=transformer.moe_grouped_gemm,
        ),
    )
    mamba = MambaLayerSubmodules(
        norm=fused_norm,
        mixer=local_mixer_spec(),
        mamba_bda=get_bias_dropout_add,  # type: ignore[arg-type]  # a function, as in Megatron's own specs
        # Transformer Engine fuses this norm with the input projection.
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )
    layers = HybridStackSubmodules(
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=experts),
    )
    return ModuleSpec(
        module=TorchHybridStack,
        submodules=with_pytorch_layers(layers, grouped_experts=transformer.moe_grouped_gemm),
    )


class TorchHybridStack(HybridStack):
    """HybridStack with a torch final norm: megatron-core 0.19.2 hard-codes Transformer Engine's."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        post_layer_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.add_module("final_norm", torch_norm(config, config.hidden_size, eps=config.layernorm_epsilon))
