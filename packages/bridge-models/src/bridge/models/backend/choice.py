"""The choice between layers of Transformer Engine and layers in PyTorch, and the limitations of both."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Mapping

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import log_single_rank

from bridge.dist.process.gpu_libraries import explain_missing
from bridge.models.errors import UnsupportedError

logger = logging.getLogger(__name__)


def uses_transformer_engine(transformer: TransformerConfig) -> bool:
    """Return whether to use Transformer Engine's layers: the configuration asks for them and they are available.

    ``transformer_impl: transformer_engine`` is Megatron-Core's default, so without Transformer Engine, or without a GPU
    to run it on, layers in PyTorch are used instead; this is logged once.
    """
    if transformer.transformer_impl != "transformer_engine":
        return False
    if not HAVE_TE:
        report_fallback(f"Transformer Engine {explain_missing('transformer_engine')}: building layers in PyTorch")
    return bool(HAVE_TE)


@functools.cache
def report_fallback(message: str) -> None:
    """Log once that layers in PyTorch are used, and why."""
    log_single_rank(logger, logging.WARNING, message)


def wants_pytorch_attention(transformer: TransformerConfig) -> bool:
    """Return whether attention is computed in PyTorch in any layers: ``attention_backend: local`` asks for it."""
    # An experimental attention computes something else, so attention in PyTorch cannot replace it.
    return transformer.attention_backend == AttnBackend.local and transformer.experimental_attention_variant is None


def require_transformer_engine(feature: str) -> None:
    """Check that Transformer Engine is available for a feature that needs it.

    Raises:
        UnsupportedError: It is not available.
    """
    if not HAVE_TE:
        raise UnsupportedError(
            f"{feature} requires Transformer Engine, which {explain_missing('transformer_engine')}: "
            "install it on a machine with a GPU, or do without the feature"
        )


Limitations = Mapping[str, tuple[Callable[[TransformerConfig], bool], str]]
"""Features that some layers lack: for each, whether a configuration asks for it, and what to set instead."""


# Without Transformer Engine, megatron-core 0.19.2 silently ignores 8- and 4-bit floats. All other features here fail in
# an assertion, an import or a kernel.
_PYTORCH_LIMITATIONS: Limitations = {
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
        # Megatron uses it only in half precision.
        lambda c: c.masked_softmax_fusion and (c.fp16 or c.bf16) and not _is_installed("scaled_masked_softmax_cuda"),
        "set transformer.masked_softmax_fusion to false",
    ),
    "fused gradient accumulation without its kernel": (
        lambda c: c.gradient_accumulation_fusion and not _is_installed("fused_weight_gradient_mlp_cuda"),
        "set transformer.gradient_accumulation_fusion to false",
    ),
    "activation offloading": (
        lambda c: c.cpu_offloading or c.fine_grained_activation_offloading,
        "set transformer.cpu_offloading and transformer.fine_grained_activation_offloading to false",
    ),
    "recomputation of norms and of experts' activations": (
        lambda c: (
            c.recompute_granularity == "selective" and bool({"layernorm", "moe_act"} & set(c.recompute_modules or ()))
        ),
        "remove layernorm and moe_act from transformer.recompute_modules",
    ),
    "ungrouped experts with biases": (
        lambda c: c.num_moe_experts is not None and c.add_bias_linear and not c.moe_grouped_gemm,
        "set transformer.moe_grouped_gemm to true or transformer.add_bias_linear to false",
    ),
}


# megatron-core 0.19.2 silently normalises the input of such queries twice.
_TRANSFORMER_ENGINE_LIMITATIONS: Limitations = {
    "normalisation of latent keys and values with uncompressed queries": (
        lambda c: c.multi_latent_attention and c.qk_layernorm and getattr(c, "q_lora_rank", 0) is None,
        "set transformer.transformer_impl to local to use layers in PyTorch",
    ),
}


def check_pytorch_support(transformer: TransformerConfig) -> None:
    """Check that layers in PyTorch support everything that a configuration asks for.

    Raises:
        UnsupportedError: They do not. The message lists every unsupported feature.
    """
    check_limitations(transformer, _PYTORCH_LIMITATIONS, layers="layers in PyTorch (without Transformer Engine)")


def check_transformer_engine_support(transformer: TransformerConfig) -> None:
    """Check that Transformer Engine's layers support everything that a configuration asks for.

    Raises:
        UnsupportedError: They do not. The message lists every unsupported feature.
    """
    check_limitations(transformer, _TRANSFORMER_ENGINE_LIMITATIONS, layers="Transformer Engine's layers")


def check_limitations(transformer: TransformerConfig, limitations: Limitations, *, layers: str) -> None:
    """Check that a configuration asks for nothing that ``layers`` lack; the name of the layers is for the message.

    Raises:
        UnsupportedError: It does. The message lists every unsupported feature.
    """
    problems = [f"{feature}: {advice}" for feature, (is_used, advice) in limitations.items() if is_used(transformer)]
    if problems:
        raise UnsupportedError(f"not supported by {layers}:\n  " + "\n  ".join(problems))


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
