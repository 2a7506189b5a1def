"""Gemma: scaled embeddings, and norms that multiply by 1 + weight."""

from __future__ import annotations

import math

from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.fields.activation import get_function_name, read_function
from bridge.models.huggingface.fields.attention import heads
from bridge.models.huggingface.fields.biases import NO_ATTENTION_BIAS, NO_BIASES
from bridge.models.huggingface.fields.decoder import decoder
from bridge.models.huggingface.fields.norms import rms_norm
from bridge.models.huggingface.fields.rope import rotary
from bridge.models.huggingface.fields.row import Row, always, only
from bridge.models.huggingface.fields.sizes import sizes
from bridge.models.huggingface.targets import ANY_TRANSFORMER, GPT
from bridge.models.huggingface.translation import FLAG, TEXT, Name, Translation, is_number
from bridge.models.huggingface.weights.decoder import decoder as decoder_weights

_ZERO_CENTERED = always(
    "transformer.layernorm_zero_centered_gamma",
    True,
    "norms of {model_type} multiply by 1 + weight",
)


def _read_embedding_scale(t: Translation) -> None:
    # Megatron-Core scales embeddings only with µP; all other factors of µP are set so that they have no effect.
    t["transformer.use_mup"] = True
    t["transformer.mup_embedding_mult"] = math.sqrt(t["hidden_size"])
    t["transformer.mup_attn_scale_power"] = 0.5


def _write_embedding_scale(t: Translation) -> None:
    if not t["transformer.use_mup"]:
        raise t.refuse("transformer.use_mup", f"{t.model_type} scales embeddings by mup_embedding_mult: must be true")
    scale, size = t["transformer.mup_embedding_mult"], t["transformer.hidden_size"]
    if not (is_number(scale) and math.isclose(scale, math.sqrt(size), rel_tol=1e-6)):
        t.refuse(
            "transformer.mup_embedding_mult",
            f"{t.model_type} scales embeddings by sqrt(hidden_size): must be {math.sqrt(size)}",
        )
    if t["transformer.mup_base_hidden_size"] not in (None, size):
        t.refuse("transformer.mup_base_hidden_size", "Megatron-Core scales logits by it: must be null")
    if t["transformer.mup_output_mult"] != 1:
        t.refuse("transformer.mup_output_mult", f"{t.model_type} does not scale logits: must be 1")
    if t["transformer.mup_attn_scale_power"] != 0.5 or t["transformer.mup_base_head_dim"] is not None:
        t.refuse(
            "transformer.mup_attn_scale_power",
            "attention scores are divided by sqrt(head_dim): must be 0.5, and mup_base_head_dim null",
        )


_EMBEDDING_SCALE = Row(
    {},
    (
        "transformer.use_mup",
        "transformer.mup_embedding_mult",
        "transformer.mup_output_mult",
        "transformer.mup_base_hidden_size",
        "transformer.mup_base_head_dim",
        "transformer.mup_attn_scale_power",
    ),
    _read_embedding_scale,
    _write_embedding_scale,
)


def _read_gelu(t: Translation) -> None:
    # Published files say "gelu", which transformers reads as the tanh approximation.
    if (function := t["hidden_activation"]) is None:
        function = t["hidden_act"]
    if function == "gelu":
        function = "gelu_pytorch_tanh"
    read_function(t, "hidden_act" if t["hidden_activation"] is None else "hidden_activation", function)


def _write_gelu(t: Translation) -> None:
    function = get_function_name(t, "gelu_pytorch_tanh")
    if function == "gelu":
        raise t.refuse("transformer.activation_func", f"{t.model_type} reads gelu as the tanh approximation")
    t["hidden_act"] = function


_GELU = Row(
    {"hidden_act": Name(TEXT, "gelu_pytorch_tanh"), "hidden_activation": Name(TEXT)},
    ("transformer.activation_func",),
    _read_gelu,
    _write_gelu,
)
GEMMA = Architecture(
    model_type="gemma",
    model_class="GemmaForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=decoder(
        sizes(
            vocab_size=256000,
            max_position_embeddings=8192,
            num_hidden_layers=28,
            hidden_size=3072,
            intermediate_size=24576,
            num_attention_heads=16,
        ),
        attention=heads(16, 256),
        positions=(rotary(), _EMBEDDING_SCALE),
        norms=(*rms_norm("rms_norm_eps", 1e-6), _ZERO_CENTERED),
        biases=(NO_BIASES, NO_ATTENTION_BIAS),
        activations=(
            only("use_bidirectional_attention", None, FLAG, "attention is causal", also=(False,)),
            _GELU,
        ),
        tied=True,
    ),
    weights=decoder_weights,
)
