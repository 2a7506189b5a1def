"""Names of Bridge's model configurations and of megatron-core's transformer configurations."""

from __future__ import annotations

GPT = "bridge.models.gpt.GPTModelConfig"
MAMBA = "bridge.models.mamba.MambaModelConfig"
T5 = "bridge.models.t5.T5ModelConfig"
LAYERS = {
    GPT: "bridge.models.layer_specs.default_layer_spec",
    MAMBA: "bridge.models.hybrid_layers.default_stack_spec",
}
"""The functions that select the layers of a model by its fields."""

_CORE = "megatron.core.transformer"
TRANSFORMER = f"{_CORE}.transformer_config.TransformerConfig"
MLA = f"{_CORE}.transformer_config.MLATransformerConfig"
HETEROGENEOUS = f"{_CORE}.heterogeneous.heterogeneous_config.HeterogeneousTransformerConfig"
YARN = "bridge.models.transformer.YarnTransformerConfig"
EXTENDED = {YARN: TRANSFORMER}
"""Bridge's transformer configurations, and the base class of each in megatron-core."""

SET_BY_TRAINING_LOOP = (
    "timers",
    "finalize_model_grads_func",
    "grad_scale_func",
    "moe_grad_scale_func",
    "mtp_grad_scale_func",
    "no_sync_func",
    "grad_sync_func",
    "param_sync_func",
)
"""The fields of a transformer by which a training loop gives functions to Megatron's schedule (0.19.2)."""

ENUMS = f"{_CORE}.enums."  # the values of these enums count from 1
