"""Mamba-2, and Nemotron-H: Mamba layers, attention, feed-forward layers and experts in one pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge.config.refusal import got
from bridge.models.huggingface.common import (
    NO_BIASES,
    NO_HIDDEN_DROPOUT,
    activation,
    attention_dropout,
    heads,
    language_model,
    rms_norm,
    sizes,
)
from bridge.models.huggingface.experts import HOW_EXPERTS_RUN
from bridge.models.huggingface.latent import scale_of_weights, sigmoid_router
from bridge.models.huggingface.mapping import (
    COUNT,
    FLAG,
    INTEGER,
    LAYERS,
    LIST,
    NUMBER,
    TEXT,
    TEXTS,
    Architecture,
    Name,
    Row,
    Translation,
    always,
    only,
    same,
)

MAMBA = "bridge.models.mamba.MambaModelConfig"
_EPSILON = 1e-5
_LAYERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}
_KINDS = {"M": "Mamba", "*": "attention", "-": "MLP", "E": "experts"}
_INFINITY = ({"__float__": "Infinity"}, float("inf"), "Infinity")


def _read_epsilon(t: Translation) -> None:
    if t["layer_norm_epsilon"] != _EPSILON:
        t.refuse(
            "layer_norm_epsilon", f"norms in Mamba layers of Megatron-Core have {_EPSILON}, and other norms may not"
        )


def _write_epsilon(t: Translation) -> None:
    if t["transformer.layernorm_epsilon"] != _EPSILON:
        t.refuse("transformer.layernorm_epsilon", f"norms in Mamba layers have {_EPSILON}: it can only be that")


def _read_limit(t: Translation) -> None:
    limit = t["time_step_limit"]
    if limit is not None and not (len(limit) == 2 and limit[0] == 0 and limit[1] in _INFINITY):
        t.refuse("time_step_limit", "Megatron-Core does not limit steps: it can only be from 0 to infinity")


def _mamba_layers(*, convolution: str, biases: tuple[str, ...], function: str) -> tuple[Row, ...]:
    """What Megatron-Core's Mamba layers are fixed to."""
    return (
        always("transformer.is_hybrid_model", True, "this architecture has Mamba layers"),
        *rms_norm("layer_norm_epsilon", _EPSILON),
        Row({}, ("transformer.layernorm_epsilon",), _read_epsilon, _write_epsilon),
        only("conv_kernel", 4, COUNT, "Megatron-Core convolves over 4 tokens"),
        only(convolution, True, FLAG, "convolutions of Megatron-Core have biases"),
        *(only(name, False, FLAG, "projections of Megatron-Core's Mamba layers have no biases") for name in biases),
        only(function, "silu", TEXT, "Megatron-Core's Mamba layers have this function"),
        Row({"time_step_limit": Name(LIST)}, (), _read_limit, lambda t: None),
        *(
            only(name, value, NUMBER, "Megatron-Core draws steps from 0.001 to 0.1, and at least 0.0001")
            for name, value in (("time_step_min", 0.001), ("time_step_max", 0.1), ("time_step_floor", 1e-4))
        ),
        NO_BIASES,
    )


_IGNORED = frozenset(
    (
        "chunk_size",  # how a scan is computed, not what
        "rescale_prenorm_residual",  # of the first weights
        "time_step_rank",
        "use_mamba_kernels",
    )
)


def _read_heads(t: Translation) -> None:
    heads = t["num_heads"]
    if heads * t["head_dim"] != t["expand"] * t["hidden_size"]:
        t.refuse("num_heads", "num_heads x head_dim is not expand x hidden_size")
    t["transformer.mamba_num_heads"] = heads
    t["transformer.num_attention_heads"] = heads  # of no layer; Megatron-Core wants a number, which tp must divide


def _write_heads(t: Translation) -> None:
    size, channels = t["transformer.hidden_size"], t["transformer.mamba_head_dim"]
    heads = t["transformer.mamba_num_heads"] or 2 * size // channels
    if heads * channels % size:
        t.refuse("transformer.mamba_num_heads", f"all heads have {heads * channels} channels, no multiple of {size}")
    t["num_heads"], t["head_dim"], t["expand"] = heads, channels, heads * channels // size


def _read_channels(t: Translation) -> None:
    t["transformer.mamba_head_dim"] = t["head_dim"]


def _write_pattern_of_mamba(t: Translation) -> None:
    pattern = t["hybrid_layer_pattern"]
    if pattern is not None and set(pattern) - set("M|"):
        t.refuse("hybrid_layer_pattern", "layers of this architecture are Mamba layers alone")


MAMBA2 = Architecture(
    model_type="mamba2",
    causal="Mamba2ForCausalLM",
    target=MAMBA,
    rows=(
        *sizes(vocab_size=32768, num_hidden_layers=64, hidden_size=4096),
        Row({}, ("hybrid_layer_pattern",), lambda t: None, _write_pattern_of_mamba),
        always("position_embedding_type", "none", "this architecture has no positions"),
        Row(
            {"num_heads": Name(COUNT, 128), "head_dim": Name(COUNT, 64), "expand": Name(COUNT, 2)},
            ("transformer.mamba_num_heads", "transformer.mamba_head_dim", "transformer.num_attention_heads"),
            _read_heads,
            _write_heads,
        ),
        Row({}, (), _read_channels, lambda t: None),
        same("state_size", "transformer.mamba_state_dim", COUNT, 128),
        same("n_groups", "transformer.mamba_num_groups", COUNT, 8),
        *_mamba_layers(convolution="use_conv_bias", biases=("use_bias",), function="hidden_act"),
        only("rms_norm", True, FLAG, "Mamba layers of Megatron-Core normalise what they gate"),
        same("residual_in_fp32", "transformer.fp32_residual_connection", FLAG, True),
        NO_HIDDEN_DROPOUT,
        *language_model(tied=False, std=0.1),
    ),
    # transformers norms after the gate whatever norm_before_gate is, and takes the sizes that the others give
    ignored=_IGNORED | {"norm_before_gate", "intermediate_size", "time_step_init_scheme", "time_step_scale"},
)


def _read_pattern(t: Translation) -> None:
    pattern = t["hybrid_override_pattern"]
    if (types := t["layers_block_type"]) is not None:
        for index, kind in enumerate(types):
            if kind not in _LAYERS:
                t.refuse("layers_block_type", f"expected one of {', '.join(_LAYERS)}, got {got(kind)}", index)
        pattern = "".join(_LAYERS.get(kind, "?") for kind in types)
    elif pattern is None:
        raise t.refuse("layers_block_type", "missing, and hybrid_override_pattern too: which layers are there?")
    elif unknown := set(pattern) - set(_KINDS):
        known = ", ".join(f"{symbol} {kind}" for symbol, kind in _KINDS.items())
        raise t.refuse("hybrid_override_pattern", f"{got(min(unknown))} is no layer; there are {known}")
    if t["num_hidden_layers"] not in (None, len(pattern)):
        t.refuse("num_hidden_layers", f"there are {len(pattern)} layers in the pattern")
    t["hybrid_layer_pattern"] = pattern
    t["transformer.num_layers"] = len(pattern)


def _write_pattern(t: Translation) -> None:
    pattern = t["hybrid_layer_pattern"]
    layers = "M" * t["transformer.num_layers"] if pattern is None else pattern.replace("|", "")
    if set(layers) - set(_KINDS):
        raise t.refuse("hybrid_layer_pattern", f"layers of this architecture are {', '.join(_KINDS.values())}")
    t["hybrid_override_pattern"], t["num_hidden_layers"] = layers, len(layers)


_PATTERN = Row(
    {"hybrid_override_pattern": Name(TEXT), "layers_block_type": Name(TEXTS), "num_hidden_layers": Name(LAYERS)},
    ("hybrid_layer_pattern", "transformer.num_layers"),
    _read_pattern,
    _write_pattern,
)

_EXPERTS: Mapping[str, tuple[str, str, int | None]] = {
    "n_routed_experts": ("transformer.num_moe_experts", COUNT, 8),
    "num_experts_per_tok": ("transformer.moe_router_topk", COUNT, 2),
    "moe_intermediate_size": ("transformer.moe_ffn_hidden_size", COUNT, 7688),
    "moe_shared_expert_intermediate_size": ("transformer.moe_shared_expert_intermediate_size", COUNT, 7688),
    "moe_latent_size": ("transformer.moe_latent_size", COUNT, None),
}


def _where_there_are_experts(row: Row) -> Row:
    """A row that is of layers of experts, and left aside where there are none."""

    def read(t: Translation) -> None:
        if "E" in t.made.get("hybrid_layer_pattern", ""):
            row.read(t)

    def write(t: Translation) -> None:
        if "E" in (t["hybrid_layer_pattern"] or ""):
            row.write(t)

    return Row(row.names, row.fields, read, write)


def _same_of_experts(name: str, path: str, kind: str, default: Any) -> Row:
    plain = same(name, path, kind, default)

    def write(t: Translation) -> None:
        if t[path] is None and default is not None:
            raise t.refuse(path, "layers of experts of this architecture have it: set it")
        plain.write(t)

    return Row(plain.names, plain.fields, plain.read, write)


NEMOTRON_H = Architecture(
    model_type="nemotron_h",
    causal="NemotronHForCausalLM",
    target=MAMBA,
    rows=(
        _PATTERN,
        *sizes(
            vocab_size=131072,
            max_position_embeddings=4096,
            hidden_size=4096,
            intermediate_size=21504,
            num_attention_heads=32,
        ),
        *heads(8, 128),
        always("position_embedding_type", "none", "this architecture has no positions"),
        only("sliding_window", None, COUNT, "attention of Megatron-Core's hybrid models has no windows"),
        same("ssm_state_size", "transformer.mamba_state_dim", COUNT, 128),
        same("mamba_num_heads", "transformer.mamba_num_heads", COUNT, 128),
        same("mamba_head_dim", "transformer.mamba_head_dim", COUNT, 64),
        same("n_groups", "transformer.mamba_num_groups", COUNT, 8),
        *_mamba_layers(
            convolution="use_conv_bias",
            biases=("use_bias", "mamba_proj_bias", "attention_bias", "mlp_bias"),
            function="mamba_hidden_act",
        ),
        activation("mlp_hidden_act", "relu2"),
        *(
            _where_there_are_experts(row)
            for row in (
                *(_same_of_experts(name, *known) for name, known in _EXPERTS.items()),
                *HOW_EXPERTS_RUN,
                *sigmoid_router(1, 1),
                scale_of_weights(1.0),
                only("n_shared_experts", 1, COUNT, "there is one expert for all tokens"),
            )
        ),
        only("num_nextn_predict_layers", 0, INTEGER, "Bridge does not translate its layers of prediction"),
        attention_dropout("attention_dropout", 0.0),
        same("hidden_dropout", "transformer.hidden_dropout", NUMBER, 0.0),
        same("residual_in_fp32", "transformer.fp32_residual_connection", FLAG, False),
        *language_model(tied=None),
    ),
    aliases={
        "attention_head_dim": "head_dim",
        "layer_types": "layers_block_type",
        "mamba_chunk_size": "chunk_size",
        "mamba_conv_bias": "use_conv_bias",
        "mamba_d_conv": "conv_kernel",
        "mamba_dt_init_floor": "time_step_floor",
        "mamba_dt_limit": "time_step_limit",
        "mamba_dt_max": "time_step_max",
        "mamba_dt_min": "time_step_min",
        "mamba_expand": "expand",
        "mamba_n_groups": "n_groups",
        "norm_eps": "layer_norm_epsilon",
        "num_local_experts": "n_routed_experts",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    # the heads give the width of Mamba layers; there are no rotary positions, whatever is said of them
    ignored=_IGNORED
    | {
        "expand",
        "mamba_ssm_cache_dtype",
        "moe_shared_expert_overlap",
        "mtp_hybrid_override_pattern",
        "mtp_layers_block_type",
        "partial_rotary_factor",
        "rope_theta",
    },
)
