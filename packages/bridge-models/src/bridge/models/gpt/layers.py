"""Which layers a GPT is built from: Transformer Engine's where it is installed, plain PyTorch elsewhere."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import log_single_rank

from bridge.config import ModelConfig
from bridge.dist.process.gpu_libraries import why_missing
from bridge.models.backend import TorchAttention
from bridge.models.backend.provider import with_pytorch_layers
from bridge.models.errors import LayerSpecError, UnsupportedError

if TYPE_CHECKING:
    from bridge.models.gpt import GPTModelConfig

logger = logging.getLogger(__name__)

SpecT = TypeVar("SpecT")

LayerSpec = ModuleSpec | TransformerBlockSubmodules
"""One layer, repeated; or the layers of one pipeline stage, one by one."""


def layer_spec(config: GPTModelConfig, *, vp_stage: int | None, pp_rank: int) -> LayerSpec:
    """Return the layers of one stage: those the configuration gives, or the default ones.

    Raises:
        UnsupportedError: The layers at hand cannot do what the configuration asks for.
        LayerSpecError: What the configuration gives is not a layer spec.
    """
    given = config.transformer_layer_spec
    if given is None:
        spec = default_layer_spec(config, vp_stage, pp_rank=pp_rank)
    else:
        spec = given_layer_spec(given, config, field="transformer_layer_spec", vp_stage=vp_stage)
    if wants_pytorch_attention(config.transformer):
        spec = with_pytorch_attention(spec)
    return spec


def default_layer_spec(config: GPTModelConfig, vp_stage: int | None = None, *, pp_rank: int | None = None) -> LayerSpec:
    """Choose the layers of one stage by what the configuration asks for.

    In this order: inference-optimised, ModelOpt, experimental attention, mixture of experts, heterogeneous,
    Transformer Engine, PyTorch.

    Args:
        config: The model.
        vp_stage: Virtual pipeline stage, None without a virtual pipeline.
        pp_rank: Pipeline rank; None asks Megatron's global process groups.

    Raises:
        UnsupportedError: The layers at hand cannot do what the configuration asks for.
    """
    transformer = config.transformer
    use_te = uses_transformer_engine(transformer)
    if transformer.transformer_impl == "inference_optimized":
        require_transformer_engine("transformer_impl: inference_optimized")
        return gpt_layer_specs.get_gpt_layer_with_inference_spec(
            transformer.qk_layernorm, transformer.multi_latent_attention, qk_l2_norm=transformer.qk_l2_norm
        )
    if config.restore_modelopt_state and use_te:  # ModelOpt's own spec is Transformer Engine's; it works on any layers
        return _modelopt_spec(config)
    if transformer.experimental_attention_variant is not None:
        require_transformer_engine(f"experimental_attention_variant: {transformer.experimental_attention_variant}")
        return get_transformer_block_with_experimental_attention_variant_spec(
            transformer, vp_stage=vp_stage, pp_rank=pp_rank
        )
    if use_te:
        refuse(transformer, _BEYOND_TRANSFORMER_ENGINE, layers="Megatron's layers of Transformer Engine")
        return _megatron_spec(transformer, use_te=True, vp_stage=vp_stage, pp_rank=pp_rank)
    refuse_beyond_pytorch(transformer)
    spec = _megatron_spec(transformer, use_te=False, vp_stage=vp_stage, pp_rank=pp_rank)
    if isinstance(spec, ModuleSpec):  # as Megatron's block does with one, but for the choice of the last norm
        layers = get_num_layers_to_build(transformer, vp_stage=vp_stage, pp_rank=pp_rank)
        spec = TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=WrappedTorchNorm)
    return _in_pytorch(spec, transformer)


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


def _in_pytorch(spec: SpecT, transformer: TransformerConfig) -> SpecT:
    return with_pytorch_layers(spec, grouped_experts=transformer.moe_grouped_gemm)


def mtp_block_spec(
    config: GPTModelConfig, spec: LayerSpec, *, vp_stage: int | None, pp_rank: int
) -> MultiTokenPredictionBlockSubmodules | None:
    """Return the multi-token prediction block of one stage, None where there is none.

    Its transformer layer is the last one of the whole decoder: that of ``spec``, the layers of this stage, if the
    configuration gives them. On a stage without decoder layers it is the plain layer.
    """
    transformer = config.transformer
    if not transformer.mtp_num_layers:
        return None
    use_te = uses_transformer_engine(transformer)
    if not use_te:
        refuse_beyond_pytorch(transformer)
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
        layer = _swap_attention(layer)
    block: MultiTokenPredictionBlockSubmodules | None = gpt_layer_specs.get_gpt_mtp_block_spec(
        transformer,
        TransformerBlockSubmodules(layer_specs=[layer]),  # a layer alone must be Megatron's own class
        use_transformer_engine=use_te,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    if block is None or use_te:
        return block
    block = _in_pytorch(block, transformer)
    return _with_layer(block, layer) if given else block


def _with_layer(block: MultiTokenPredictionBlockSubmodules, layer: ModuleSpec) -> MultiTokenPredictionBlockSubmodules:
    """Return a copy of a multi-token prediction block with this transformer layer at each depth."""
    depths: list[ModuleSpec] = block.layer_specs or []
    parts: list[Any] = [depth.submodules for depth in depths]
    return replace(
        block,
        layer_specs=[
            replace(depth, submodules=replace(part, mtp_model_layer=layer))
            for depth, part in zip(depths, parts, strict=True)
        ],
    )


def uses_transformer_engine(transformer: TransformerConfig) -> bool:
    """Whether layers come from Transformer Engine: when the configuration asks for it, and it can be used here.

    ``transformer_impl: transformer_engine`` is Megatron-Core's default, so without Transformer Engine, or without a GPU
    to run it on, the layers in PyTorch are taken instead; the log says so once.
    """
    if transformer.transformer_impl != "transformer_engine":
        return False
    if not HAVE_TE:
        _report_fallback()
    return bool(HAVE_TE)


@functools.cache
def _report_fallback() -> None:
    message = f"Transformer Engine {why_missing('transformer_engine')}: building layers in PyTorch"
    log_single_rank(logger, logging.WARNING, message)


def given_layer_spec(
    given: LayerSpec | Callable[..., Any], config: ModelConfig, *, field: str, vp_stage: int | None = None
) -> LayerSpec:
    """Return the layers that a configuration gives: a spec, or what a function of the configuration returns.

    Args:
        given: The spec, or the function, which may take ``vp_stage`` by name.
        config: What the function gets.
        field: The field that gives them, for errors.
        vp_stage: Virtual pipeline stage, None without a virtual pipeline.

    Raises:
        LayerSpecError: It is neither, or the function returns something else.
    """
    if isinstance(given, LayerSpec):  # before callable(): a ModuleSpec is also callable
        return given
    if not callable(given):
        raise LayerSpecError(f"{field} is {given!r}: give a ModuleSpec, a function that returns one, or None")
    takes_stage = "vp_stage" in inspect.signature(given).parameters
    spec = given(config, vp_stage=vp_stage) if takes_stage else given(config)
    if not isinstance(spec, LayerSpec):
        raise LayerSpecError(
            f"{field} {getattr(given, '__qualname__', repr(given))} returned {spec!r}: "
            "it must return a ModuleSpec or a TransformerBlockSubmodules"
        )
    return spec


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
    # Imported here: it takes ModelOpt's own dependencies, which only a model with a ModelOpt state needs.
    from megatron.core.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec

    arbitrary_mask = config.use_arbitrary_attention_mask
    if arbitrary_mask is None:  # speculative decoding trains with one; context parallelism knows only causal masks
        arbitrary_mask = config.transformer.context_parallel_size == 1
    return cast(
        LayerSpec,
        get_gpt_modelopt_spec(config.transformer, remap_te_layernorm=True, use_arbitrary_attention_mask=arbitrary_mask),
    )


def wants_pytorch_attention(transformer: TransformerConfig) -> bool:
    """Whether attention is computed by plain PyTorch in any layers: ``attention_backend: local`` asks for it."""
    # An experimental attention is a computation of its own, not another way to do the usual one.
    return transformer.attention_backend == AttnBackend.local and transformer.experimental_attention_variant is None


def with_pytorch_attention(spec: LayerSpec) -> LayerSpec:
    """Return a copy of ``spec`` whose attention is computed by plain PyTorch; ``spec`` itself is left alone.

    Layers that have no such part (no-op or linear attention of heterogeneous models) stay as they are.
    """
    if isinstance(spec, TransformerBlockSubmodules):
        return replace(spec, layer_specs=[_swap_attention(layer) for layer in spec.layer_specs or []])
    return _swap_attention(spec)


def _swap_attention(layer: ModuleSpec) -> ModuleSpec:
    parts: Any = layer.submodules
    swapped = {}
    for name in ("self_attention", "cross_attention"):
        attention = getattr(parts, name, None)
        if isinstance(attention, ModuleSpec) and hasattr(attention.submodules, "core_attention"):
            attention_parts: Any = attention.submodules
            swapped[name] = replace(attention, submodules=replace(attention_parts, core_attention=TorchAttention))
    return replace(layer, submodules=replace(parts, **swapped)) if swapped else layer


Refusals = Mapping[str, tuple[Callable[[TransformerConfig], bool], str]]
"""What some layers cannot do: whether a configuration asks for it, and what to set instead."""

# Layers without Transformer Engine. Each of these fails in an assertion, an import or a kernel of megatron-core 0.19.2;
# only 8- and 4-bit floats are passed over in silence.
_BEYOND_PYTORCH: Refusals = {
    "persistent layer norm": (lambda c: c.persist_layer_norm, "set transformer.persist_layer_norm to false"),
    "memory-efficient layer norm": (
        lambda c: c.memory_efficient_layer_norm,
        "set transformer.memory_efficient_layer_norm to false",
    ),
    "experts in a latent space": (
        lambda c: c.moe_latent_size is not None,
        "install Transformer Engine, or set transformer.moe_latent_size to null",
    ),
    "8- or 4-bit floats": (lambda c: bool(c.fp8 or c.fp4), "set transformer.fp8 and transformer.fp4 to null"),
    "fused softmax without its kernels": (
        # asked for only at 16 bits
        lambda c: c.masked_softmax_fusion and (c.fp16 or c.bf16) and not _is_installed("scaled_masked_softmax_cuda"),
        "set transformer.masked_softmax_fusion to false",
    ),
    "fused gradient accumulation without its kernel": (
        lambda c: c.gradient_accumulation_fusion and not _is_installed("fused_weight_gradient_mlp_cuda"),
        "set transformer.gradient_accumulation_fusion to false",
    ),
    "offloading of activations": (
        lambda c: c.cpu_offloading or c.fine_grained_activation_offloading,
        "set transformer.cpu_offloading and transformer.fine_grained_activation_offloading to false",
    ),
    "recomputation of norms and of experts' activations": (
        lambda c: (
            c.recompute_granularity == "selective" and bool({"layernorm", "moe_act"} & set(c.recompute_modules or ()))
        ),
        "take layernorm and moe_act out of transformer.recompute_modules",
    ),
    "experts one by one with biases": (
        lambda c: c.num_moe_experts is not None and c.add_bias_linear and not c.moe_grouped_gemm,
        "set transformer.moe_grouped_gemm to true or transformer.add_bias_linear to false",
    ),
}


# Passed over in silence in megatron-core 0.19.2, which norms the input of such queries once more.
_BEYOND_TRANSFORMER_ENGINE: Refusals = {
    "normalised keys and values beside queries that are not compressed": (
        lambda c: c.multi_latent_attention and c.qk_layernorm and getattr(c, "q_lora_rank", 0) is None,
        "set transformer.transformer_impl to local, for layers in PyTorch",
    ),
}


def refuse_beyond_pytorch(transformer: TransformerConfig) -> None:
    """Raise one error for all that the layers without Transformer Engine cannot do of what a configuration asks for.

    Raises:
        UnsupportedError: There is something.
    """
    refuse(transformer, _BEYOND_PYTORCH, layers="layers in PyTorch, without Transformer Engine,")


def refuse(transformer: TransformerConfig, refusals: Refusals, *, layers: str) -> None:
    """Raise one error for all that a configuration asks for and some layers, which ``layers`` names, cannot do.

    Raises:
        UnsupportedError: There is something.
    """
    found = [f"{what}: {advice}" for what, (asked, advice) in refusals.items() if asked(transformer)]
    if found:
        raise UnsupportedError(f"{layers} cannot do:\n  " + "\n  ".join(found))


def require_transformer_engine(what: str) -> None:
    """Check that Transformer Engine can be used, for something that needs it.

    Raises:
        UnsupportedError: It cannot.
    """
    if not HAVE_TE:
        raise UnsupportedError(
            f"{what} needs Transformer Engine, which {why_missing('transformer_engine')}: "
            "install it where there is a GPU, or leave it out"
        )


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
