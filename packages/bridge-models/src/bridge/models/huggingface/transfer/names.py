"""One spelling of each parameter of the whole model, whichever layers it was built from."""

from __future__ import annotations

import re

_SPELLINGS = (
    # Transformer Engine fuses a norm into the linear layer after it.
    (r"self_attention\.linear_qkv\.layer_norm_(weight|bias)", r"input_layernorm.\1"),
    (r"self_attention\.linear_q_up_proj\.layer_norm_(weight|bias)", r"self_attention.q_layernorm.\1"),
    (r"self_attention\.linear_kv_up_proj\.layer_norm_(weight|bias)", r"self_attention.kv_layernorm.\1"),
    (r"mlp\.linear_fc1\.layer_norm_(weight|bias)", r"pre_mlp_layernorm.\1"),
    (r"mixer\.in_proj\.layer_norm_(weight|bias)", r"norm.\1"),
    # Experts in modules of their own.
    (r"local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)", r"\2.\3\1"),
    # megatron-core before 0.16
    (r"^(mtp\.layers\.\d+)\.transformer_layer\.", r"\1.mtp_model_layer."),
)


def canonicalize_name(name: str) -> str:
    """Return the spelling of weight tables for the full-model name of a parameter (``placement.full_name``)."""
    for pattern, replacement in _SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name
