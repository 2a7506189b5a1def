from bigram.model import BigramConfig
from megatron.core.transformer import MegatronModule, TransformerConfig


def freeze(stage: MegatronModule) -> None:
    stage.requires_grad_(False)


transformer = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
BigramConfig(transformer=transformer, vocab_size=8, pre_wrap_hooks=[freeze])  # E: List item 0 has incompatible type "Callable[[MegatronModule], None]"; expected "Callable[[list[MegatronModule]], list[MegatronModule]]"  [list-item]
