"""The classes that documents of these models name."""

GPT = "bridge.models.gpt.GPTModelConfig"
MAMBA = "bridge.models.mamba.MambaModelConfig"
T5 = "bridge.models.t5.T5ModelConfig"

TRANSFORMER = "megatron.core.transformer.transformer_config.TransformerConfig"
LATENT_TRANSFORMER = "megatron.core.transformer.transformer_config.MLATransformerConfig"
YARN_TRANSFORMER = "bridge.models.transformer.YarnTransformerConfig"

ANY_TRANSFORMER = (TRANSFORMER, YARN_TRANSFORMER)
"""The classes of transformers with rotary positions."""

GENERATION = "transformers.generation.configuration_utils.GenerationConfig"
