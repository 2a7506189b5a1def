"""Choice between Transformer Engine's layers and layers in PyTorch, and the limits of each."""

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
    """Whether attention is computed by plain PyTorch in any layers: ``attention_backend: local`` asks for it."""
    # An experimental attention is a computation of its own, not another way to do the usual one.
    return transformer.attention_backend == AttnBackend.local and transformer.experimental_attention_variant is None


def require_transformer_engine(what: str) -> None:
    """Check that Transformer Engine is available for a feature that needs it.

    Raises:
        UnsupportedError: It cannot.
    """
    if not HAVE_TE:
        raise UnsupportedError(
            f"{what} needs Transformer Engine, which {explain_missing('transformer_engine')}: "
            "install it where there is a GPU, or leave it out"
        )


Refusals = Mapping[str, tuple[Callable[[TransformerConfig], bool], str]]
"""Unsupported features: for each, whether a configuration asks for it, and what to set instead."""


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
    """Raise one error listing every requested feature that layers without Transformer Engine lack.

    Raises:
        UnsupportedError: The configuration asks for at least one of them.
    """
    refuse(transformer, _BEYOND_PYTORCH, layers="layers in PyTorch, without Transformer Engine,")


def refuse_beyond_transformer_engine(transformer: TransformerConfig) -> None:
    """Raise one error listing every requested feature that Transformer Engine's layers lack.

    Raises:
        UnsupportedError: The configuration asks for at least one of them.
    """
    refuse(transformer, _BEYOND_TRANSFORMER_ENGINE, layers="Megatron's layers of Transformer Engine")


def refuse(transformer: TransformerConfig, refusals: Refusals, *, layers: str) -> None:
    """Raise one error listing every requested feature that ``layers`` lack.

    Raises:
        UnsupportedError: The configuration asks for at least one of them.
    """
    found = [f"{what}: {advice}" for what, (asked, advice) in refusals.items() if asked(transformer)]
    if found:
        raise UnsupportedError(f"{layers} cannot do:\n  " + "\n  ".join(found))


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
