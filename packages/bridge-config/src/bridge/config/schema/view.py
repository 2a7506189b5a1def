"""The fields of a config by attribute, whether it is a live object or a mapping in a document."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any

from bridge.config.schema.ranges import TRANSFORMER
from bridge.config.tables import Target, shipped_dtypes


class View:
    """What a config of a document holds once it is made: what is given, defaults, and what its constructor derives.

    It has the attributes of the live config, so that a check reads both alike. Enumeration members and functions are
    their names here, dtypes are written ``torch.bfloat16``, and sequences may be lists where the live config has
    tuples. An embedded config is a view too; its fields can also be read from the config that embeds it.
    """

    def __init__(self, data: Mapping[str, Any], target: Target, embedded: object = None) -> None:
        """Make the view of a mapping that was read without a problem.

        Args:
            data: The mapping; live values may stand in it.
            target: Its class.
            embedded: The config that it embeds, live or a view; None if it embeds none.
        """
        values = self.__dict__
        values.update(_defaults(target))
        values.update(data)
        if target.embeds is not None and embedded is not None:
            values.update(vars(embedded))  # which owns the fields that both have
            values[target.embeds] = embedded
        elif TRANSFORMER in target.bases:
            _derive(values)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def _defaults(target: Target) -> dict[str, Any]:
    """The default of each field; None for one that has none."""
    known: dict[str, Any] | None = target.shapes.get(_DEFAULTS)
    if known is None:
        known = {name: None if field.default is MISSING else field.default for name, field in target.fields.items()}
        target.shapes[_DEFAULTS] = known
    return known


_DEFAULTS = ("defaults", (), ())


def _derive(values: dict[str, Any]) -> None:
    """Set what the constructor of TransformerConfig derives from other fields, where checks read it.

    Source: ``__post_init__`` of TransformerConfig and of ModelParallelConfig, megatron-core 0.19.2.
    """
    heads, tp = values["num_attention_heads"], values["tensor_model_parallel_size"]
    derived = {
        "ffn_hidden_size": 4 * values["hidden_size"],
        "kv_channels": values["hidden_size"] // heads if heads else None,
        "num_query_groups": heads,
        "expert_tensor_parallel_size": tp,
        "recompute_modules": ["core_attn"],
        "microbatch_group_size_per_vp_stage": values["pipeline_model_parallel_size"],
    }
    for name, value in derived.items():
        if values[name] is None:
            values[name] = value
    if values["num_moe_experts"] is not None and values["moe_ffn_hidden_size"] is None:
        values["moe_ffn_hidden_size"] = values["ffn_hidden_size"]
    for ranks, shards, part in (
        ("tensor_model_parallel_size", "tensor_parallel_num_weight_shards", "gtp_weight_remat_size"),
        ("expert_tensor_parallel_size", "expert_tensor_parallel_num_weight_shards", "expert_gtp_weight_remat_size"),
    ):
        if values[shards] is not None:
            values[part] = values[shards] // values[ranks]
    dtypes = shipped_dtypes()
    for name in ("params_dtype", "pipeline_dtype"):
        if isinstance(values[name], str):
            values[name] = dtypes.get(values[name].removeprefix("torch."), values[name])
    layout = values["pipeline_model_parallel_layout"]
    if isinstance(layout, (str, list)) and values["virtual_pipeline_model_parallel_size"] is None:
        stages = _stages(layout) if isinstance(layout, str) else len(layout)
        virtual = stages // values["pipeline_model_parallel_size"]
        values["virtual_pipeline_model_parallel_size"] = virtual if virtual > 1 else None


_REPEATED = re.compile(r"(?:\(([^()]+)\)|([^()*]))\*(\d{1,9})")


def _stages(layout: str) -> int:
    """The number of stages of a pipeline layout such as ``Et|(tt|)*29,m|L``."""
    stages = layout.count("|") + 1
    for group, one, times in _REPEATED.findall(layout):
        stages += (group or one).count("|") * (int(times) - 1)
    return stages
