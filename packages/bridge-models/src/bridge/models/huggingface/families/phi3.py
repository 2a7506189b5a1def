"""Phi-3: Llama with windows and partial rotary positions."""

from __future__ import annotations

from functools import partial

from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.fields.attention import heads
from bridge.models.huggingface.fields.decoder import decoder
from bridge.models.huggingface.fields.dropout import attention_dropout, residual_dropout
from bridge.models.huggingface.fields.norms import rms_norm
from bridge.models.huggingface.fields.rope import rotary
from bridge.models.huggingface.fields.sizes import sizes
from bridge.models.huggingface.fields.windows import window_everywhere
from bridge.models.huggingface.targets import ANY_TRANSFORMER, GPT
from bridge.models.huggingface.weights.attention import fused_attention
from bridge.models.huggingface.weights.decoder import decoder as decoder_weights
from bridge.models.huggingface.weights.feed_forward import fused_feed_forward

PHI3 = Architecture(
    model_type="phi3",
    model_class="Phi3ForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=decoder(
        sizes(
            vocab_size=32064,
            max_position_embeddings=4096,
            num_hidden_layers=32,
            hidden_size=3072,
            intermediate_size=8192,
            num_attention_heads=32,
        ),
        attention=(*heads(None), window_everywhere(None)),
        positions=(rotary(partial=True, original=4096, kinds=()),),
        norms=rms_norm("rms_norm_eps", 1e-5),
        dropout=(attention_dropout("attention_dropout", 0.0), residual_dropout(0.0, 0.0)),
    ),
    weights=partial(decoder_weights, attention=fused_attention, feed_forward=fused_feed_forward),
    yields_to=("llama", "mistral"),
)
