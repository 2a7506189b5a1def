"""Nemotron-H: Mamba layers, attention, feed-forward layers and experts in one pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge.config.problems import describe_value
from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.fields.activation import activation
from bridge.models.huggingface.fields.attention import heads
from bridge.models.huggingface.fields.dropout import attention_dropout
from bridge.models.huggingface.fields.experts import EXPERT_SETTINGS
from bridge.models.huggingface.fields.language_model import language_model
from bridge.models.huggingface.fields.mamba import IGNORED_BY_MAMBA, mamba_layers
from bridge.models.huggingface.fields.routers import sigmoid_router, weight_scale
from bridge.models.huggingface.fields.row import Row, always, only, same
from bridge.models.huggingface.fields.sizes import sizes
from bridge.models.huggingface.targets import MAMBA
from bridge.models.huggingface.translation import COUNT, FLAG, INTEGER, LAYERS, NUMBER, TEXT, TEXTS, Name, Translation
from bridge.models.huggingface.weights.mamba import hybrid

_LAYERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}
_KINDS = {"M": "Mamba", "*": "attention", "-": "MLP", "E": "experts"}


def _read_pattern(t: Translation) -> None:
    pattern = t["hybrid_override_pattern"]
    if (types := t["layers_block_type"]) is not None:
        for index, kind in enumerate(types):
            if kind not in _LAYERS:
                t.refuse(
                    "layers_block_type", f"expected one of {', '.join(_LAYERS)}, got {describe_value(kind)}", index
                )
        pattern = "".join(_LAYERS.get(kind, "?") for kind in types)
    elif pattern is None:
        raise t.refuse("layers_block_type", "missing: set it or hybrid_override_pattern")
    elif unknown := set(pattern) - set(_KINDS):
        known = ", ".join(f"{symbol} {kind}" for symbol, kind in _KINDS.items())
        raise t.refuse("hybrid_override_pattern", f"unknown layer {describe_value(min(unknown))}; expected {known}")
    if t["num_hidden_layers"] not in (None, len(pattern)):
        t.refuse("num_hidden_layers", f"must be {len(pattern)}, the number of layers in the pattern")
    t["hybrid_layer_pattern"] = pattern
    t["transformer.num_layers"] = len(pattern)


def _write_pattern(t: Translation) -> None:
    pattern = t["hybrid_layer_pattern"]
    layers = "M" * t["transformer.num_layers"] if pattern is None else pattern.replace("|", "")
    if set(layers) - set(_KINDS):
        raise t.refuse("hybrid_layer_pattern", f"{t.model_type} supports these layers: {', '.join(_KINDS.values())}")
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


def _if_experts(row: Row) -> Row:
    """Return a row that applies only if some layers have experts."""

    def read(t: Translation) -> None:
        if "E" in t.output.get("hybrid_layer_pattern", ""):
            row.read(t)

    def write(t: Translation) -> None:
        if "E" in (t["hybrid_layer_pattern"] or ""):
            row.write(t)

    return Row(row.names, row.fields, read, write)


def _expert_field(name: str, path: str, kind: str, default: Any) -> Row:
    plain = same(name, path, kind, default)

    def write(t: Translation) -> None:
        if t[path] is None and default is not None:
            raise t.refuse(path, f"missing: layers with experts of {t.model_type} need it")
        plain.write(t)

    return Row(plain.names, plain.fields, plain.read, write)


NEMOTRON_H = Architecture(
    model_type="nemotron_h",
    model_class="NemotronHForCausalLM",
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
        always("position_embedding_type", "none", "{model_type} has no position embeddings"),
        only("sliding_window", None, COUNT, "attention in Megatron-Core's hybrid models has no windows"),
        same("ssm_state_size", "transformer.mamba_state_dim", COUNT, 128),
        same("mamba_num_heads", "transformer.mamba_num_heads", COUNT, 128),
        same("mamba_head_dim", "transformer.mamba_head_dim", COUNT, 64),
        same("n_groups", "transformer.mamba_num_groups", COUNT, 8),
        *mamba_layers(
            convolution="use_conv_bias",
            biases=("use_bias", "mamba_proj_bias", "attention_bias", "mlp_bias"),
            function="mamba_hidden_act",
        ),
        activation("mlp_hidden_act", "relu2"),
        *(
            _if_experts(row)
            for row in (
                *(_expert_field(name, *known) for name, known in _EXPERTS.items()),
                *EXPERT_SETTINGS,
                *sigmoid_router(1, 1),
                weight_scale(1.0),
                only("n_shared_experts", 1, COUNT, "{model_type} has one shared expert"),
            )
        ),
        only(
            "num_nextn_predict_layers", 0, INTEGER, "Bridge does not support the multi-token prediction of {model_type}"
        ),
        attention_dropout("attention_dropout", 0.0),
        same("hidden_dropout", "transformer.hidden_dropout", NUMBER, 0.0),
        same("residual_in_fp32", "transformer.fp32_residual_connection", FLAG, False),
        *language_model(tied=None),
    ),
    weights=hybrid,
    base="backbone.",
    unused_tensors=(),
    yields_to=("mamba2",),
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
    # the heads determine the size of Mamba layers; there are no rotary positions, whatever their fields say
    ignored=IGNORED_BY_MAMBA
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
