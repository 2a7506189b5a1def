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

ENUMS = f"{_CORE}.enums."  # the values of these enums count from 1
