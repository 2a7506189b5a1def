"""Attention heads: groups, channels, score scaling, norms of queries and keys."""

from __future__ import annotations

import math

from bridge.models.huggingface.fields.row import Row, always, only
from bridge.models.huggingface.translation import COUNT, FLAG, Name, Translation


def _write_scores(t: Translation) -> None:
    scale, channels = t["transformer.softmax_scale"], t["transformer.kv_channels"]
    channels = channels or t["transformer.hidden_size"] // t["transformer.num_attention_heads"]
    usual = channels**-0.5
    if scale is not None and not math.isclose(scale, usual):
        t.refuse(
            "transformer.softmax_scale", f"{t.model_type} scales attention scores by {usual}: must be that or null"
        )


SCORES = Row({}, ("transformer.softmax_scale",), lambda t: None, _write_scores)
"""Attention scores are divided by sqrt(kv_channels); a finalized configuration states this explicitly."""


def heads(key_value_heads: int | None, head_dim: int | None = None) -> tuple[Row, ...]:
    """Return the rows of query groups and of channels per head.

    Args:
        key_value_heads: The default of ``num_key_value_heads`` in transformers.
        head_dim: The default of ``head_dim``; None for hidden_size / num_attention_heads.
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
            raise t.refuse("num_attention_heads", f"does not divide hidden_size {t['hidden_size']}: set head_dim")
        # Left out of the document if both sides derive it from hidden_size.
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


_NORMALISED = "{model_type} normalises queries and keys"
QK_NORM = (
    always("transformer.qk_layernorm", True, _NORMALISED),
    only("use_qk_norm", True, FLAG, _NORMALISED),  # transformers has no such field, but published files do
)
