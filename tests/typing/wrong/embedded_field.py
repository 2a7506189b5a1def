from bigram.model import BigramConfig
from megatron.core.transformer import TransformerConfig

transformer = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
BigramConfig(transformer=transformer, vocab_size=8, num_layers=2)  # E: Unexpected keyword argument "num_layers" for "BigramConfig"  [call-arg]
config = BigramConfig(transformer=transformer, vocab_size=8)
config.num_layers = "two"  # E: Incompatible types in assignment (expression has type "str", variable has type "int")  [assignment]
config.num_layer = 2  # E: "BigramConfig" has no attribute "num_layer"  [attr-defined]
hidden = config.hiden_size  # E: "BigramConfig" has no attribute "hiden_size"  [attr-defined]
