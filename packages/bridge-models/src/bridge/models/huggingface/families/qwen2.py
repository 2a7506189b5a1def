"""Qwen2 and Qwen2.5: biases in the query, key and value projections, and windows by layer."""

from __future__ import annotations

from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.fields.attention import heads
from bridge.models.huggingface.fields.biases import NO_BIASES, QKV_BIAS
from bridge.models.huggingface.fields.decoder import decoder
from bridge.models.huggingface.fields.sizes import sizes
from bridge.models.huggingface.fields.windows import window_by_switch
from bridge.models.huggingface.targets import ANY_TRANSFORMER, GPT
from bridge.models.huggingface.weights.decoder import decoder as decoder_weights

QWEN2 = Architecture(
    model_type="qwen2",
    model_class="Qwen2ForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=decoder(
        sizes(
            vocab_size=151936,
            max_position_embeddings=32768,
            num_hidden_layers=32,
            hidden_size=4096,
            intermediate_size=22016,
            num_attention_heads=32,
        ),
        attention=(*heads(32), window_by_switch()),
        biases=(NO_BIASES, QKV_BIAS),
    ),
    weights=decoder_weights,
)
