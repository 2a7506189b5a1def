"""GPT-OSS: experts with biases and clamped gates, attention sinks, windows in every other layer."""

from __future__ import annotations

from functools import partial

from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.fields.attention import heads
from bridge.models.huggingface.fields.biases import ALL_BIASES
from bridge.models.huggingface.fields.decoder import decoder
from bridge.models.huggingface.fields.experts import experts, experts_everywhere
from bridge.models.huggingface.fields.norms import rms_norm
from bridge.models.huggingface.fields.rope import rotary
from bridge.models.huggingface.fields.routers import AUX_LOSS, softmax_router
from bridge.models.huggingface.fields.row import always, only, same
from bridge.models.huggingface.fields.sizes import sizes
from bridge.models.huggingface.fields.windows import alternating_windows
from bridge.models.huggingface.targets import ANY_TRANSFORMER, GPT
from bridge.models.huggingface.translation import FLAG, NUMBER, TEXT
from bridge.models.huggingface.weights.decoder import decoder as decoder_weights
from bridge.models.huggingface.weights.experts import packed_experts

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

GPT_OSS = Architecture(
    model_type="gpt_oss",
    model_class="GptOssForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=decoder(
        (
            *sizes(
                vocab_size=201088,
                max_position_embeddings=131072,
                num_hidden_layers=36,
                hidden_size=2880,
                num_attention_heads=64,
            ),
            *experts_everywhere(2880),
        ),
        attention=(*heads(8, 64), alternating_windows(128, lambda index: index % 2 == 0)),
        positions=(
            rotary(150000.0, default=_YARN),
            always("transformer.softmax_type", "learnable", "each head of {model_type} has an attention sink"),
        ),
        norms=rms_norm("rms_norm_eps", 1e-5),
        biases=(
            ALL_BIASES,
            only("attention_bias", True, FLAG, "{model_type} has biases in all linear layers"),
        ),
        activations=(
            always(
                "transformer.activation_func",
                "megatron.core.fusions.fused_bias_geglu.quick_gelu",
                "gates of {model_type} compute x * sigmoid(1.702 x)",
            ),
            only("hidden_act", "silu", TEXT, "{model_type} names the gate of its experts silu"),
            only("swiglu_alpha", 1.702, NUMBER, "Megatron-Core hard-codes this slope"),
            same("swiglu_limit", "transformer.activation_func_clamp_value", NUMBER, 7.0),
            always("transformer.glu_linear_offset", 1.0, "{model_type} adds 1 to the gated value"),
        ),
        experts=(*experts("num_local_experts", 128, 4), softmax_router(normalises=None), AUX_LOSS),
    ),
    weights=partial(decoder_weights, experts=packed_experts),
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    ignored=frozenset(("initial_context_length",)),  # unused: rope_scaling says it
)
