"""GPTs whose layers are all of one kind: GPT-2, and those that began with Llama."""

from __future__ import annotations

import math

from bridge.models.huggingface.common import (
    GATED,
    NO_BIASES,
    NO_HIDDEN_DROPOUT,
    SCORES,
    activation,
    attention_dropout,
    feed_forward,
    heads,
    language_model,
    read_function,
    rms_norm,
    sizes,
    written_function,
)
from bridge.models.huggingface.mapping import (
    COUNT,
    FLAG,
    GPT,
    LAYERS,
    NUMBER,
    TEXT,
    Architecture,
    Name,
    Row,
    Translation,
    always,
    only,
    same,
)
from bridge.models.huggingface.rope import ANY_TRANSFORMER, rotary
from bridge.models.huggingface.windows import window_by_switch, window_everywhere

NO_ATTENTION_BIAS = only(
    "attention_bias",
    False,
    FLAG,
    "Megatron-Core has biases in all linear layers, or in those of queries, keys and values alone",
)


def _residual_dropout(residual: float, embedding: float) -> Row:
    """Megatron-Core has one dropout for the embedding's output and for what each layer adds."""

    def read(t: Translation) -> None:
        dropout = t["resid_pdrop"]
        if t["embd_pdrop"] != dropout:
            t.refuse("embd_pdrop", f"Megatron-Core has one dropout for embedding and layers: resid_pdrop is {dropout}")
        t["transformer.hidden_dropout"] = dropout

    def write(t: Translation) -> None:
        t["resid_pdrop"] = t["embd_pdrop"] = t["transformer.hidden_dropout"]

    return Row(
        {"resid_pdrop": Name(NUMBER, residual), "embd_pdrop": Name(NUMBER, embedding)},
        ("transformer.hidden_dropout",),
        read,
        write,
    )


def _read_biases(t: Translation) -> None:
    if t["attention_bias"] != t["mlp_bias"]:
        raise t.refuse(
            "attention_bias",
            "Megatron-Core has biases in all linear layers, or in those of queries, keys and values alone: "
            "it can only be what mlp_bias is",
        )
    t["transformer.add_bias_linear"] = t["attention_bias"]


def _write_biases(t: Translation) -> None:
    t["attention_bias"] = t["mlp_bias"] = t["transformer.add_bias_linear"]


_LLAMA_BIASES = Row(
    {"attention_bias": Name(FLAG, False), "mlp_bias": Name(FLAG, False)},
    ("transformer.add_bias_linear",),
    _read_biases,
    _write_biases,
)
QKV_BIAS = always("transformer.add_qkv_bias", True, "queries, keys and values of this architecture have biases")
_NORMALISED = "queries and keys of this architecture are normalised"
QK_NORM = (
    always("transformer.qk_layernorm", True, _NORMALISED),
    only("use_qk_norm", True, FLAG, _NORMALISED),  # not of transformers, but published files say it
)

GPT2 = Architecture(
    model_type="gpt2",
    causal="GPT2LMHeadModel",
    target=GPT,
    rows=(
        same("vocab_size", "vocab_size", COUNT, 50257),
        same("n_positions", "seq_length", COUNT, 1024),
        same("n_layer", "transformer.num_layers", LAYERS, 12),
        same("n_embd", "transformer.hidden_size", COUNT, 768),
        same("n_head", "transformer.num_attention_heads", COUNT, 12),
        feed_forward("n_inner", "transformer.ffn_hidden_size", COUNT, None),
        always("position_embedding_type", "learned_absolute", "positions of this architecture are learned"),
        always("transformer.normalization", "LayerNorm", "all norms of this architecture are of one kind"),
        always("transformer.add_bias_linear", True, "all linear layers of this architecture have biases"),
        same("layer_norm_epsilon", "transformer.layernorm_epsilon", NUMBER, 1e-5),
        activation("activation_function", "gelu_new"),
        _residual_dropout(0.1, 0.1),
        attention_dropout("attn_pdrop", 0.1),
        SCORES,
        only("scale_attn_weights", True, FLAG, "scores are divided by the root of the channels"),
        only("scale_attn_by_inverse_layer_idx", False, FLAG, "Megatron-Core scales scores of all layers by one number"),
        only("reorder_and_upcast_attn", False, FLAG, "Megatron-Core has another order of computing scores"),
        only("add_cross_attention", False, FLAG, "Megatron-Core's GPT has no cross attention"),
        *language_model(tied=True),
    ),
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    ignored=frozenset(
        (
            "n_ctx",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        )
    ),
)

LLAMA = Architecture(
    model_type="llama",
    causal="LlamaForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=(
        *sizes(
            vocab_size=32000,
            max_position_embeddings=2048,
            num_hidden_layers=32,
            hidden_size=4096,
            intermediate_size=11008,
            num_attention_heads=32,
        ),
        *heads(None),
        rotary(),
        *rms_norm("rms_norm_eps", 1e-6),
        GATED,
        _LLAMA_BIASES,
        activation("hidden_act", "silu"),
        attention_dropout("attention_dropout", 0.0),
        NO_HIDDEN_DROPOUT,
        *language_model(tied=False),
    ),
    ignored=frozenset(("pretraining_tp",)),
)

MISTRAL = Architecture(
    model_type="mistral",
    causal="MistralForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=(
        *sizes(
            vocab_size=32000,
            max_position_embeddings=131072,
            num_hidden_layers=32,
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
        ),
        *heads(8),
        window_everywhere(4096),
        rotary(),
        *rms_norm("rms_norm_eps", 1e-6),
        GATED,
        NO_BIASES,
        activation("hidden_act", "silu"),
        attention_dropout("attention_dropout", 0.0),
        NO_HIDDEN_DROPOUT,
        *language_model(tied=False),
    ),
)

QWEN2 = Architecture(
    model_type="qwen2",
    causal="Qwen2ForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=(
        *sizes(
            vocab_size=151936,
            max_position_embeddings=32768,
            num_hidden_layers=32,
            hidden_size=4096,
            intermediate_size=22016,
            num_attention_heads=32,
        ),
        *heads(32),
        window_by_switch(),
        rotary(),
        *rms_norm("rms_norm_eps", 1e-6),
        GATED,
        NO_BIASES,
        QKV_BIAS,
        activation("hidden_act", "silu"),
        attention_dropout("attention_dropout", 0.0),
        NO_HIDDEN_DROPOUT,
        *language_model(tied=False),
    ),
)

QWEN3 = Architecture(
    model_type="qwen3",
    causal="Qwen3ForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=(
        *sizes(
            vocab_size=151936,
            max_position_embeddings=32768,
            num_hidden_layers=32,
            hidden_size=4096,
            intermediate_size=22016,
            num_attention_heads=32,
        ),
        *heads(32, 128),
        window_by_switch(),
        rotary(),
        *rms_norm("rms_norm_eps", 1e-6),
        GATED,
        NO_BIASES,
        NO_ATTENTION_BIAS,
        *QK_NORM,
        activation("hidden_act", "silu"),
        attention_dropout("attention_dropout", 0.0),
        NO_HIDDEN_DROPOUT,
        *language_model(tied=False),
    ),
)

PHI3 = Architecture(
    model_type="phi3",
    causal="Phi3ForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=(
        *sizes(
            vocab_size=32064,
            max_position_embeddings=4096,
            num_hidden_layers=32,
            hidden_size=3072,
            intermediate_size=8192,
            num_attention_heads=32,
        ),
        *heads(None),
        window_everywhere(None),
        rotary(partial=True, original=4096, kinds=()),
        *rms_norm("rms_norm_eps", 1e-5),
        GATED,
        NO_BIASES,
        activation("hidden_act", "silu"),
        attention_dropout("attention_dropout", 0.0),
        _residual_dropout(0.0, 0.0),
        *language_model(tied=False),
    ),
)

_ZERO_CENTERED = always(
    "transformer.layernorm_zero_centered_gamma",
    True,
    "norms of this architecture multiply by one more than their weight",
)


def _read_embedding_scale(t: Translation) -> None:
    # The only factor of embeddings that Megatron-Core has is that of µP, which is the usual model but for what is set.
    t["transformer.use_mup"] = True
    t["transformer.mup_embedding_mult"] = math.sqrt(t["hidden_size"])
    t["transformer.mup_attn_scale_power"] = 0.5


def _write_embedding_scale(t: Translation) -> None:
    if not t["transformer.use_mup"]:
        raise t.refuse("transformer.use_mup", "this architecture multiplies embeddings, by mup_embedding_mult")
    scale, size = t["transformer.mup_embedding_mult"], t["transformer.hidden_size"]
    if not math.isclose(scale, math.sqrt(size), rel_tol=1e-6):
        t.refuse(
            "transformer.mup_embedding_mult", f"it is the root of hidden_size in this architecture: {math.sqrt(size)}"
        )
    if t["transformer.mup_base_hidden_size"] not in (None, size):
        t.refuse("transformer.mup_base_hidden_size", "Megatron-Core scales logits by it: set it to null")
    if t["transformer.mup_output_mult"] != 1:
        t.refuse("transformer.mup_output_mult", "this architecture does not scale logits: set it to 1")
    if t["transformer.mup_attn_scale_power"] != 0.5 or t["transformer.mup_base_head_dim"] is not None:
        t.refuse(
            "transformer.mup_attn_scale_power",
            "scores are divided by the root of the channels: set it to 0.5, and mup_base_head_dim to null",
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
    # Published files say "gelu" and mean the tanh approximation, as transformers has it.
    if (function := t["hidden_activation"]) is None:
        function = t["hidden_act"]
    if function == "gelu":
        function = "gelu_pytorch_tanh"
    read_function(t, "hidden_act" if t["hidden_activation"] is None else "hidden_activation", function)


def _write_gelu(t: Translation) -> None:
    function = written_function(t, "gelu_pytorch_tanh")
    if function == "gelu":
        raise t.refuse("transformer.activation_func", "gelu means the tanh approximation in this architecture")
    t["hidden_act"] = function


_GELU = Row(
    {"hidden_act": Name(TEXT, "gelu_pytorch_tanh"), "hidden_activation": Name(TEXT)},
    ("transformer.activation_func",),
    _read_gelu,
    _write_gelu,
)

GEMMA = Architecture(
    model_type="gemma",
    causal="GemmaForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=(
        *sizes(
            vocab_size=256000,
            max_position_embeddings=8192,
            num_hidden_layers=28,
            hidden_size=3072,
            intermediate_size=24576,
            num_attention_heads=16,
        ),
        *heads(16, 256),
        rotary(),
        _EMBEDDING_SCALE,
        *rms_norm("rms_norm_eps", 1e-6),
        _ZERO_CENTERED,
        GATED,
        NO_BIASES,
        NO_ATTENTION_BIAS,
        only("use_bidirectional_attention", None, FLAG, "tokens see those before them alone", also=(False,)),
        _GELU,
        attention_dropout("attention_dropout", 0.0),
        NO_HIDDEN_DROPOUT,
        *language_model(tied=True),
    ),
)
