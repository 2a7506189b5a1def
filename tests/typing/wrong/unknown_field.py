from bigram.model import BigramConfig
from megatron.core.transformer import TransformerConfig

transformer = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
config = BigramConfig(transformer=transformer, vocab_size=8, hidden=8)  # E: Unexpected keyword argument "hidden" for "BigramConfig"  [call-arg]
config.vocabsize = 16  # E: "BigramConfig" has no attribute "vocabsize"; maybe "vocab_size"?  [attr-defined]
