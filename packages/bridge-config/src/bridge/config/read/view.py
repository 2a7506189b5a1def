"""Gives checks the fields of a mapping in a document as attributes, like those of a live config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

from bridge.config.schema.pipeline_layout import parse_stages
from bridge.config.schema.ranges import TRANSFORMER
from bridge.config.schema.table import get_shipped_dtypes
from bridge.config.schema.target import Target
from bridge.config.write.encoded_defaults import encode_default


class View:
    """A config in a document, as it will be constructed: given values, defaults and derived values.

    It has the attributes of the live config, so that a check works for both. Enumeration members and functions are
    names, dtypes are strings such as ``torch.bfloat16``, and sequences may be lists where the live config has tuples.
    An embedded config is a view too; its fields can also be read from the config that embeds it.
    """

    def __init__(self, data: Mapping[str, Any], target: Target, embedded: object = None) -> None:
        """Create the view of a mapping that was read without problems.

        Args:
            data: The mapping; live values may stand in it.
            target: Its class.
            embedded: The config that it embeds, live or a view; None if it embeds none.
        """
        values = vars(self)
        values.update(data)
        values[_TARGET], values[_EMBEDDED] = target, embedded
        self.derived: frozenset[str] = frozenset()
        """The fields that are not given, but derived by the constructor."""
        if embedded is not None and target.embeds is not None:
            values[target.embeds] = embedded
        elif TRANSFORMER in target.bases:
            _set_derived_values(self)

    def __getattr__(self, name: str) -> Any:
        # Called for attributes that are not given. The embedded config owns the fields that both have.
        values = vars(self)
        embedded, fields = values[_EMBEDDED], values[_TARGET].fields
        if embedded is not None and (name not in fields or hasattr(embedded, name)):
            return getattr(embedded, name)
        if name not in fields:
            raise AttributeError(name)
        default = encode_default(values[_TARGET], name)
        return None if default is MISSING else default


# These keys cannot collide with field names.
_TARGET, _EMBEDDED = "(target)", "(embedded)"


def _set_derived_values(config: View) -> None:
    """Set what the constructor of TransformerConfig derives from other fields, where checks read it.

    Source: ``__post_init__`` of TransformerConfig and of ModelParallelConfig, megatron-core 0.19.2.
    """
    values, heads = vars(config), config.num_attention_heads
    derived = {
        "ffn_hidden_size": 4 * config.hidden_size,
        "kv_channels": config.hidden_size // heads if heads else None,
        "num_query_groups": heads,
        "expert_tensor_parallel_size": config.tensor_model_parallel_size,
        "microbatch_group_size_per_vp_stage": config.pipeline_model_parallel_size,
        "recompute_modules": ["core_attn"],
    }
    config.derived = frozenset(name for name in derived if values.get(name) is None)
    values.update({name: derived[name] for name in config.derived})
    if config.num_moe_experts is not None and config.moe_ffn_hidden_size is None:
        values["moe_ffn_hidden_size"] = config.ffn_hidden_size
    for ranks, shards, part in (
        ("tensor_model_parallel_size", "tensor_parallel_num_weight_shards", "gtp_weight_remat_size"),
        ("expert_tensor_parallel_size", "expert_tensor_parallel_num_weight_shards", "expert_gtp_weight_remat_size"),
    ):
        if values.get(shards) is not None:
            values[part] = values[shards] // getattr(config, ranks)
    for name in ("params_dtype", "pipeline_dtype"):
        if isinstance(given := values.get(name), str):
            values[name] = get_shipped_dtypes().get(given.removeprefix("torch."), given)
    if config.fp32_residual_connection and values.get("pipeline_dtype") is not None:
        values["pipeline_dtype"] = "torch.float32"
    stages = parse_stages(values.get("pipeline_model_parallel_layout"))
    if stages is not None and config.virtual_pipeline_model_parallel_size is None:
        virtual = len(stages) // config.pipeline_model_parallel_size
        values["virtual_pipeline_model_parallel_size"] = virtual if virtual > 1 else None
