"""Known architectures that Megatron-Core does not support."""

from __future__ import annotations

from collections.abc import Mapping

_MORE_NORMS = "its post-attention and post-MLP norms have no counterpart"
_CAPS = {
    "attn_logit_softcapping": "Megatron-Core does not cap attention scores",
    "final_logit_softcapping": "Megatron-Core does not cap logits",
}
_TWO_BASES = {"rope_local_base_freq": "Megatron-Core has one rotary base for all layers"}
UNSUPPORTED: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "gemma2": (_MORE_NORMS, _CAPS),
    "gemma3_text": (_MORE_NORMS, _CAPS | _TWO_BASES),
    "gemma3": (_MORE_NORMS, {"vision_config": "Bridge has no vision models"}),
}
"""By ``model_type``: the reason, and further unsupported fields with theirs."""
