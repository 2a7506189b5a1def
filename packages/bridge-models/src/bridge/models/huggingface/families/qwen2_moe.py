"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, one of them shared."""

from __future__ import annotations

from functools import partial

from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.fields.attention import heads
from bridge.models.huggingface.fields.biases import NO_BIASES
from bridge.models.huggingface.fields.decoder import decoder
from bridge.models.huggingface.fields.experts import SPARSE_LAYERS, expert_width, experts, shared_expert
from bridge.models.huggingface.fields.routers import AUX_LOSS, softmax_router
from bridge.models.huggingface.fields.row import same
from bridge.models.huggingface.fields.sizes import sizes
from bridge.models.huggingface.fields.windows import window_by_switch
from bridge.models.huggingface.targets import ANY_TRANSFORMER, GPT
from bridge.models.huggingface.translation import FLAG
from bridge.models.huggingface.weights.decoder import decoder as decoder_weights
from bridge.models.huggingface.weights.experts import experts as expert_weights

QWEN2_MOE = Architecture(
    model_type="qwen2_moe",
    model_class="Qwen2MoeForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=decoder(
        sizes(
            vocab_size=151936,
            max_position_embeddings=32768,
            num_hidden_layers=24,
            hidden_size=2048,
            intermediate_size=5632,
            num_attention_heads=16,
        ),
        attention=(*heads(16), window_by_switch(alternating=True)),
        biases=(NO_BIASES, same("qkv_bias", "transformer.add_qkv_bias", FLAG, True)),
        experts=(
            *experts("num_experts", 60, 4),
            expert_width("moe_intermediate_size", 1408),
            shared_expert(5632),
            SPARSE_LAYERS,
            softmax_router(normalises=False),
            AUX_LOSS,
        ),
    ),
    weights=partial(decoder_weights, experts=partial(expert_weights, shared="shared_expert")),
)
