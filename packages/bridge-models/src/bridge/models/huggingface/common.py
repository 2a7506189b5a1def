"""Rows that several architectures share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bridge.models.huggingface.mapping import (
    ANYTHING,
    COUNT,
    FLAG,
    LAYERS,
    NUMBER,
    TEXT,
    Name,
    Row,
    Translation,
    always,
    only,
    same,
    setting,
    unknown_choice,
)

GENERATION = "transformers.generation.configuration_utils.GenerationConfig"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id")

_GELU = "torch.nn.functional.gelu"
_TANH_GELU: Mapping[str, Any] = {"_target_": _GELU, "_partial_": True, "approximate": "tanh"}
_ACTIVATIONS: Mapping[str, Any] = {
    "silu": "torch.nn.functional.silu",
    "swish": "torch.nn.functional.silu",
    "gelu": _GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "gelu_new": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "relu": "torch.nn.functional.relu",
    "relu2": "megatron.core.activations.squared_relu",
    "quick_gelu": "megatron.core.fusions.fused_bias_geglu.quick_gelu",
    "mish": "torch.nn.functional.mish",
}
"""The functions of config.json. Those of one formula are one function here: GELU by tanh has three names."""

_DTYPES = {"float32": "torch.float32", "bfloat16": "torch.bfloat16", "float16": "torch.float16"}
_HALF = {"torch.bfloat16": "transformer.bf16", "torch.float16": "transformer.fp16"}

NO_HIDDEN_DROPOUT = setting(
    "transformer.hidden_dropout", 0.0, of_training="of training, and config.json of this architecture has none"
)


def sizes(**defaults: int | None) -> tuple[Row, ...]:
    """The sizes that have the same names everywhere.

    Args:
        defaults: What transformers takes for each where it is left out.
    """
    fields = {
        "vocab_size": "vocab_size",
        "max_position_embeddings": "seq_length",
        "num_hidden_layers": "transformer.num_layers",
        "hidden_size": "transformer.hidden_size",
        "intermediate_size": "transformer.ffn_hidden_size",
        "num_attention_heads": "transformer.num_attention_heads",
    }
    return tuple(
        feed_forward(name, fields[name], COUNT, default)
        if name == "intermediate_size"
        else same(name, fields[name], LAYERS if name == "num_hidden_layers" else COUNT, default)
        for name, default in defaults.items()
    )


def feed_forward(name: str, path: str, kind: str, default: int | None, *, times: int = 4) -> Row:
    """The width of feed-forward layers; where a document leaves it out, it is four times the hidden size."""

    def read(t: Translation) -> None:
        if (width := t[name]) is not None:
            t[path] = width

    def write(t: Translation) -> None:
        width = t[path]
        if width is not None or default is not None:
            t[name] = times * t["transformer.hidden_size"] if width is None else width

    return Row({name: Name(kind, default)}, (path,), read, write)


def _write_scores(t: Translation) -> None:
    scale, channels = t["transformer.softmax_scale"], t["transformer.kv_channels"]
    channels = channels or t["transformer.hidden_size"] // t["transformer.num_attention_heads"]
    if scale is not None and not math.isclose(scale, channels**-0.5):
        t.refuse("transformer.softmax_scale", "scores are divided by the root of the channels in this architecture")


SCORES = Row({}, ("transformer.softmax_scale",), lambda t: None, _write_scores)
"""Scores of attention are divided by the root of a head's channels; a configuration that was made may say so itself."""


def heads(key_value_heads: int | None, head_dim: int | None = None) -> tuple[Row, ...]:
    """Groups of heads that share keys and values, and the channels of a head.

    Args:
        key_value_heads: What transformers takes for ``num_key_value_heads`` where it is left out.
        head_dim: What it takes for ``head_dim``; None for the hidden size's share.
    """

    def read_groups(t: Translation) -> None:
        groups = t["num_key_value_heads"]
        if groups is not None and groups != t["num_attention_heads"]:
            t["transformer.num_query_groups"] = groups

    def write_groups(t: Translation) -> None:
        groups = t["transformer.num_query_groups"]
        t["num_key_value_heads"] = t["transformer.num_attention_heads"] if groups is None else groups

    def read_channels(t: Translation) -> None:
        share, rest = divmod(t["hidden_size"], t["num_attention_heads"])
        channels = t["head_dim"]
        if channels is None and rest:
            raise t.refuse("num_attention_heads", f"does not divide hidden_size {t['hidden_size']}: give a head_dim")
        if channels is not None and (head_dim is not None or channels != share or rest):
            t["transformer.kv_channels"] = channels

    def write_channels(t: Translation) -> None:
        channels = t["transformer.kv_channels"]
        if channels is None and head_dim is not None:
            channels = t["transformer.hidden_size"] // t["transformer.num_attention_heads"]
        if channels is not None:
            t["head_dim"] = channels

    return (
        Row(
            {"num_key_value_heads": Name(COUNT, key_value_heads, null=True)},
            ("transformer.num_query_groups",),
            read_groups,
            write_groups,
        ),
        Row(
            {"head_dim": Name(COUNT, head_dim, null=True)}, ("transformer.kv_channels",), read_channels, write_channels
        ),
        SCORES,
    )


def activation(name: str, default: str) -> Row:
    """The function between the matrices of a feed-forward layer."""

    def read(t: Translation) -> None:
        read_function(t, name, t[name])

    def write(t: Translation) -> None:
        t[name] = written_function(t, default)

    return Row({name: Name(TEXT, default)}, ("transformer.activation_func",), read, write)


def read_function(t: Translation, name: str, function: str) -> None:
    """Take a function by its name in config.json.

    Raises:
        RefusedError: It is not known.
    """
    if function not in _ACTIVATIONS:
        raise unknown_choice(t, name, function, _ACTIVATIONS)
    t["transformer.activation_func"] = _ACTIVATIONS[function]


def written_function(t: Translation, usual: str) -> str:
    """The name in config.json of the document's function: the usual one where that is among its names.

    Raises:
        RefusedError: transformers does not have it.
    """
    function = t["transformer.activation_func"]
    names = [known for known, own in _ACTIVATIONS.items() if own == function]
    if not names:
        what = function.get("_target_") if isinstance(function, dict) else function
        raise t.refuse("transformer.activation_func", f"transformers has no function {what}")
    return usual if usual in names else names[0]


def _read_dtype(t: Translation) -> None:
    name = "dtype" if t["dtype"] is not None else "torch_dtype"
    if t[name] is None:
        return
    dtype = t[name].removeprefix("torch.")
    if dtype not in _DTYPES:
        raise unknown_choice(t, name, dtype, _DTYPES)
    if half := _HALF.get(_DTYPES[dtype]):
        t[half] = True
    t["transformer.params_dtype"] = _DTYPES[dtype]


def _write_dtype(t: Translation) -> None:
    dtype = next((name for name, flag in _HALF.items() if t[flag]), t["transformer.params_dtype"])
    names = [known for known, own in _DTYPES.items() if own == dtype]
    if not names:
        raise t.refuse("transformer.params_dtype", f"models of transformers are not of {dtype}")
    t["torch_dtype"] = names[0]


DTYPE = Row(
    {"dtype": Name(TEXT), "torch_dtype": Name(TEXT)},
    ("transformer.params_dtype", "transformer.bf16", "transformer.fp16"),
    _read_dtype,
    _write_dtype,
)


def _read_tokens(t: Translation) -> None:
    tokens = {name: t[name] for name in TOKENS if name in t.given}
    for name, value in tokens.items():
        many = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if not all(one is None or type(one) is int for one in many):
            t.refuse(name, "expected the number of a token")
    if tokens:
        t["generation_config"] = {"_target_": GENERATION} | tokens


def _write_tokens(t: Translation) -> None:
    settings = t["generation_config"] or {}
    for name in TOKENS:
        if name in settings:
            t[name] = settings[name]
    rest = [name for name in settings if name not in TOKENS and not name.startswith("_")]
    if rest:
        t.note(f"$.generation_config is for generation_config.json, but for tokens: left out are {', '.join(rest)}")


SPECIAL_TOKENS = Row(dict.fromkeys(TOKENS, Name(ANYTHING)), ("generation_config",), _read_tokens, _write_tokens)


def _read_origin(t: Translation) -> None:
    if name := t["_name_or_path"]:
        t["hf_model_id"] = name


def _write_origin(t: Translation) -> None:
    if name := t["hf_model_id"]:
        t["_name_or_path"] = name


ORIGIN = Row({"_name_or_path": Name(TEXT)}, ("hf_model_id",), _read_origin, _write_origin)


def language_model(*, tied: bool | None, std: float = 0.02) -> tuple[Row, ...]:
    """What every language model has, beside its sizes.

    Args:
        tied: What transformers takes for ``tie_word_embeddings`` where it is left out; None where it never ties.
        std: Likewise for ``initializer_range``.
    """
    never = "transformers gives this architecture an output layer of its own, whatever it says"
    ties: tuple[Row, ...] = (
        only("tie_word_embeddings", False, FLAG, never),
        always("share_embeddings_and_output_weights", False, never),
    )
    if tied is not None:
        ties = (same("tie_word_embeddings", "share_embeddings_and_output_weights", FLAG, tied),)
    return (
        ORIGIN,
        SPECIAL_TOKENS,
        DTYPE,
        *ties,
        same("initializer_range", "transformer.init_method_std", NUMBER, std),
    )


def attention_dropout(name: str, default: float) -> Row:
    """Dropout of attention; null is none."""

    def read(t: Translation) -> None:
        t["transformer.attention_dropout"] = t[name] or 0.0

    def write(t: Translation) -> None:
        t[name] = t["transformer.attention_dropout"]

    return Row({name: Name(NUMBER, default, null=True)}, ("transformer.attention_dropout",), read, write)


def rms_norm(name: str, eps: float) -> tuple[Row, ...]:
    """Norms by root mean square."""
    return (
        always("transformer.normalization", "RMSNorm", "all norms of this architecture are of one kind"),
        same(name, "transformer.layernorm_epsilon", NUMBER, eps),
    )


GATED = always("transformer.gated_linear_unit", True, "feed-forward layers of this architecture are gated")
NO_BIASES = always("transformer.add_bias_linear", False, "linear layers of this architecture have no biases")
