"""Qwen3-MoE: Qwen3 with experts."""

from __future__ import annotations

from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.fields.attention import QK_NORM, heads
from bridge.models.huggingface.fields.biases import NO_ATTENTION_BIAS, NO_BIASES
from bridge.models.huggingface.fields.decoder import decoder
from bridge.models.huggingface.fields.experts import SPARSE_LAYERS, expert_width, experts
from bridge.models.huggingface.fields.routers import AUX_LOSS, softmax_router
from bridge.models.huggingface.fields.sizes import sizes
from bridge.models.huggingface.fields.windows import window_by_switch
from bridge.models.huggingface.targets import ANY_TRANSFORMER, GPT
from bridge.models.huggingface.weights.decoder import decoder as decoder_weights

QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=decoder(
        sizes(
            vocab_size=151936,
            max_position_embeddings=32768,
            num_hidden_layers=24,
            hidden_size=2048,
            intermediate_size=6144,
            num_attention_heads=32,
        ),
        attention=(*heads(4), window_by_switch(everywhere=True)),
        biases=(NO_BIASES, NO_ATTENTION_BIAS, *QK_NORM),
        experts=(
            *experts("num_experts", 128, 8),
            expert_width("moe_intermediate_size", 768),
            SPARSE_LAYERS,
            softmax_router(normalises=False),
            AUX_LOSS,
        ),
    ),
    weights=decoder_weights,
    aliases={"num_local_experts": "num_experts"},
    ignored=frozenset(("max_window_layers",)),
)
