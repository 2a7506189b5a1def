"""Fusions of layers: the ones that Megatron-LM and NVIDIA's recipes use, as far as every machine can run them.

Documents leave out those that Megatron-Core refuses to construct without Transformer Engine or Apex. They are listed in
docs/huggingface.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SILU = "torch.nn.functional.silu"
_QUICK_GELU = "megatron.core.fusions.fused_bias_geglu.quick_gelu"
_SQUARED_RELU = "megatron.core.activations.squared_relu"


def find_fusions(fields: Mapping[str, Any]) -> dict[str, bool]:
    """Return the fusions that compute the same model, by name; those that are off are left out.

    Args:
        fields: Fields of a document by dotted path, with defaults.
    """
    config = {name.removeprefix("transformer."): value for name, value in fields.items()}
    has_experts = config["num_moe_experts"] is not None
    chosen = {
        "bias_activation_fusion": _can_fuse_activation(config),
        "use_fused_weighted_squared_relu": has_experts and config["activation_func"] == _SQUARED_RELU,
        # megatron-core 0.19.2 refuses it for experts with biases.
        "bias_dropout_fusion": not (has_experts and config["add_bias_linear"]),
        # The fused loss of megatron-core 0.19.2 rounds the gradients of logits to bf16.
        "cross_entropy_loss_fusion": config["bf16"],
    }
    return {name: True for name, fuses in chosen.items() if fuses}


def _can_fuse_activation(config: Mapping[str, Any]) -> bool:
    """Return whether megatron-core 0.19.2 has a fused function that computes this activation.

    Its fused GELU is the tanh approximation even where the configuration asks for the exact function, and it refuses to
    fuse a configuration that asks for the approximation.
    """
    if not config["gated_linear_unit"]:
        return False
    if config["activation_func"] == _SILU:
        return config["activation_func_clamp_value"] is None and not config["glu_linear_offset"]
    # Only experts have a fused quick GELU; dense layers and shared experts have none.
    every = config["moe_layer_freq"]
    experts_only = config["num_moe_experts"] is not None and (every == 1 or (isinstance(every, list) and all(every)))
    return (
        config["activation_func"] == _QUICK_GELU
        and experts_only
        and config["moe_shared_expert_intermediate_size"] is None
    )
