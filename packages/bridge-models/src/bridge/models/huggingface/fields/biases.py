"""Biases of linear layers."""

from __future__ import annotations

from bridge.models.huggingface.fields.row import Row, always, only
from bridge.models.huggingface.translation import FLAG, Name, Translation

NO_BIASES = always("transformer.add_bias_linear", False, "{model_type} has no biases in linear layers")
ALL_BIASES = always("transformer.add_bias_linear", True, "{model_type} has biases in all linear layers")
QKV_BIAS = always("transformer.add_qkv_bias", True, "{model_type} has biases in the query, key and value projections")
NO_ATTENTION_BIAS = only(
    "attention_bias",
    False,
    FLAG,
    "Megatron-Core has biases in all linear layers, or only in the query, key and value projections",
)


def _read_biases(t: Translation) -> None:
    if t["attention_bias"] != t["mlp_bias"]:
        raise t.refuse(
            "attention_bias",
            "Megatron-Core has biases in all linear layers, or only in the query, key and value projections: "
            "must equal mlp_bias",
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
"""Llama has two switches for biases, Megatron-Core one."""
