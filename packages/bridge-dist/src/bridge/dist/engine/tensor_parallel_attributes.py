"""Set Megatron's tensor-parallel attributes, which record whether and how a parameter is split over ranks."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.tensor_parallel import (
    set_defaults_if_not_set_tensor_model_parallel_attributes,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import MegatronModule

_SPLIT_DIMENSIONS = {"softmax_offset": 0}
"""The split dimension of parameters that Megatron does not mark, by the last part of their name.

Attention sinks (``softmax_offset``) hold a value for each head of this rank. megatron-core 0.19.2 marks neither those
of ``DotProductAttention`` nor those of Transformer Engine's attention. Unmarked, its gradient norm would count them on
the first rank only.
"""


def mark_split_parameters(stage: MegatronModule) -> None:
    """Set the attributes of parameters that are split but not marked by Megatron."""
    for name, parameter in stage.named_parameters():
        dim = _SPLIT_DIMENSIONS.get(name.rpartition(".")[2])
        if dim is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def set_default_attributes(stages: Sequence[MegatronModule]) -> None:
    """Set the attributes of all other parameters to unsplit; Megatron's optimizer reads them."""
    for stage in stages:
        for parameter in stage.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
