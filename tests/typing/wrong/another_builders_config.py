from bigram.model import BigramBuilder
from megatron.core.transformer import TransformerConfig

from bridge.models.gpt import GPTModelConfig

config = GPTModelConfig(transformer=TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
BigramBuilder(config)  # E: Argument 1 to "BigramBuilder" has incompatible type "GPTModelConfig"; expected "BigramConfig"  [arg-type]
