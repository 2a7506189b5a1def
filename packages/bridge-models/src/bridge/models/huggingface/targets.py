"""Class names in documents of these models."""

GPT = "bridge.models.gpt.GPTModelConfig"
MAMBA = "bridge.models.mamba.MambaModelConfig"
T5 = "bridge.models.t5.T5ModelConfig"

TRANSFORMER = "megatron.core.transformer.transformer_config.TransformerConfig"
LATENT_TRANSFORMER = "megatron.core.transformer.transformer_config.MLATransformerConfig"
YARN_TRANSFORMER = "bridge.models.transformer.YarnTransformerConfig"

ANY_TRANSFORMER = (TRANSFORMER, YARN_TRANSFORMER)
"""The transformer classes of models with rotary positions."""

GENERATION = "transformers.generation.configuration_utils.GenerationConfig"
