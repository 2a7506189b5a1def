"""Biases of linear layers."""

from __future__ import annotations

from bridge.models.huggingface.fields.row import Row, always, only
from bridge.models.huggingface.translation import FLAG, Name, Translation

NO_BIASES = always("transformer.add_bias_linear", False, "linear layers of {model_type} have no biases")
ALL_BIASES = always("transformer.add_bias_linear", True, "all linear layers of {model_type} have biases")
QKV_BIAS = always("transformer.add_qkv_bias", True, "queries, keys and values of {model_type} have biases")
NO_ATTENTION_BIAS = only(
    "attention_bias",
    False,
    FLAG,
    "Megatron-Core has biases in all linear layers, or in those of queries, keys and values alone",
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


BIASES = Row(
    {"attention_bias": Name(FLAG, False), "mlp_bias": Name(FLAG, False)},
    ("transformer.add_bias_linear",),
    _read_biases,
    _write_biases,
)
"""Llama's two switches, which Megatron-Core has one for."""
