"""Mixtral: Mistral with experts in all layers."""

from __future__ import annotations

from functools import partial

from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.fields.attention import heads
from bridge.models.huggingface.fields.decoder import decoder
from bridge.models.huggingface.fields.experts import experts, experts_everywhere
from bridge.models.huggingface.fields.norms import rms_norm
from bridge.models.huggingface.fields.rope import rotary
from bridge.models.huggingface.fields.routers import AUX_LOSS, softmax_router
from bridge.models.huggingface.fields.row import only
from bridge.models.huggingface.fields.sizes import sizes
from bridge.models.huggingface.fields.windows import window_everywhere
from bridge.models.huggingface.targets import ANY_TRANSFORMER, GPT
from bridge.models.huggingface.translation import NUMBER
from bridge.models.huggingface.weights.decoder import decoder as decoder_weights
from bridge.models.huggingface.weights.experts import experts as expert_weights

MIXTRAL = Architecture(
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=decoder(
        (
            *sizes(
                vocab_size=32000,
                max_position_embeddings=131072,
                num_hidden_layers=32,
                hidden_size=4096,
                num_attention_heads=32,
            ),
            *experts_everywhere(14336),
        ),
        attention=(*heads(8), window_everywhere(None)),
        positions=(rotary(1e6),),
        norms=rms_norm("rms_norm_eps", 1e-5),
        experts=(
            *experts("num_local_experts", 8, 2),
            softmax_router(normalises=None),
            AUX_LOSS,
            only("router_jitter_noise", 0.0, NUMBER, "Megatron-Core adds noise to the input of routers only"),
        ),
    ),
    weights=partial(
        decoder_weights, experts=partial(expert_weights, names=("w1", "w3", "w2"), module="block_sparse_moe")
    ),
    aliases={"num_experts": "num_local_experts"},
)
