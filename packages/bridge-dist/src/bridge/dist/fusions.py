"""Fusions that only Transformer Engine's layers have. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bridge.config import Document

_APPLIES: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any]], bool]] = {
    # Its kernel supports neither the scaled rotation of YaRN nor interleaved channels. For multi-latent attention,
    # megatron-core 0.19.2 has one of its own, which it calls experimental.
    "apply_rope_fusion": lambda model, transformer: (
        model.get("position_embedding_type") == "rope"
        and not str(transformer.get("_target_")).endswith(".MLATransformerConfig")
        and not transformer.get("multi_latent_attention")
        and not transformer.get("rotary_interleaved")
    ),
    "moe_permute_fusion": lambda model, transformer: bool(transformer.get("num_moe_experts")),
}
"""Fields of Megatron's TransformerConfig, which refuses them without Transformer Engine, and when they apply."""


def choose_fusions(document: Document) -> list[str]:
    """Set the fusions that apply in a document, for Transformer Engine's layers; return their names.

    Fields that the document sets are left as they are.
    """
    transformer = document.data.get("transformer")
    if not isinstance(transformer, dict) or transformer.get("transformer_impl") == "local":
        return []
    chosen = [
        name for name, applies in _APPLIES.items() if name not in transformer and applies(document.data, transformer)
    ]
    for name in chosen:
        document.set(f"transformer.{name}", True)
    return chosen
