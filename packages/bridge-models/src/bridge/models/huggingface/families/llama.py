"""Llama, versions 1 to 3."""

from __future__ import annotations

from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.fields.biases import BIASES
from bridge.models.huggingface.fields.decoder import decoder
from bridge.models.huggingface.fields.sizes import sizes
from bridge.models.huggingface.targets import ANY_TRANSFORMER, GPT
from bridge.models.huggingface.weights.decoder import decoder as decoder_weights

LLAMA = Architecture(
    model_type="llama",
    model_class="LlamaForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=decoder(
        sizes(
            vocab_size=32000,
            max_position_embeddings=2048,
            num_hidden_layers=32,
            hidden_size=4096,
            intermediate_size=11008,
            num_attention_heads=32,
        ),
        biases=(BIASES,),
    ),
    weights=decoder_weights,
    ignored=frozenset(("pretraining_tp",)),
)
