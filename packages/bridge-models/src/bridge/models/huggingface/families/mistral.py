"""Mistral: Llama with windows and without biases."""

from __future__ import annotations

from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.fields.attention import heads
from bridge.models.huggingface.fields.decoder import decoder
from bridge.models.huggingface.fields.sizes import sizes
from bridge.models.huggingface.fields.windows import window_everywhere
from bridge.models.huggingface.targets import ANY_TRANSFORMER, GPT
from bridge.models.huggingface.weights.decoder import decoder as decoder_weights

MISTRAL = Architecture(
    model_type="mistral",
    model_class="MistralForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=decoder(
        sizes(
            vocab_size=32000,
            max_position_embeddings=131072,
            num_hidden_layers=32,
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
        ),
        attention=(*heads(8), window_everywhere(4096)),
    ),
    weights=decoder_weights,
    yields_to=("llama",),
)
