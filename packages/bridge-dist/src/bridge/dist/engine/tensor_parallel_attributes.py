"""Set Megatron's tensor-parallel attributes, which record whether and how a parameter is split over ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron.core.tensor_parallel import (
    set_defaults_if_not_set_tensor_model_parallel_attributes,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import MegatronModule
from megatron.core.utils import get_model_config

_SPLIT_DIMENSIONS = {"softmax_offset": 0}
"""The split dimension of parameters that Megatron does not mark, by the last part of their name.

Attention sinks (``softmax_offset``) hold a value for each head of this rank. megatron-core 0.19.2 marks neither those
of ``DotProductAttention`` nor those of Transformer Engine's attention. Unmarked, its gradient norm would count them on
the first rank only.
"""


_FIRST_OF_EXPERTS = re.compile(r".*\.experts\.(.*\.)?linear_fc1\.(weight|bias)\d*")


def mark_split_parameters(stage: MegatronModule) -> None:
    """Set the attributes of parameters that are split but not marked by Megatron, or marked wrong.

    Of gated experts, each rank holds a part of the gate and one of the gated values, as of all gated layers.
    megatron-core 0.19.2 marks this for all but experts of Transformer Engine, which get a stride of 1.
    """
    config = get_model_config(stage)
    is_gated = config.gated_linear_unit and config.moe_mlp_glu_interleave_size is None
    for name, parameter in stage.named_parameters():
        if is_gated and _FIRST_OF_EXPERTS.fullmatch(name) and getattr(parameter, "tensor_model_parallel", False):
            parameter.partition_stride = 2  # type: ignore[attr-defined]
        dim = _SPLIT_DIMENSIONS.get(name.rpartition(".")[2])
        if dim is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def set_default_attributes(stages: Sequence[MegatronModule]) -> None:
    """Set the attributes of all other parameters to unsplit; Megatron's optimizer reads them."""
    for stage in stages:
        for parameter in stage.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
