"""Setting Megatron's tensor-parallel attributes of parameters: which are split over ranks, and how."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.tensor_parallel import (
    set_defaults_if_not_set_tensor_model_parallel_attributes,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import MegatronModule

_SPLIT_DIMENSIONS = {"softmax_offset": 0}
"""The dimension that is split, by a parameter's own name.

Attention sinks hold a value for each head of this rank. megatron-core 0.19.2 marks neither those of its own attention
(``DotProductAttention``) nor those that it takes from Transformer Engine's: without a mark its gradient norm counts
them on the first rank alone.
"""


def mark_split_parameters(stage: MegatronModule) -> None:
    """Give each parameter of a built stage that is split, and does not say so, Megatron's attributes for it."""
    for name, parameter in stage.named_parameters():
        dim = _SPLIT_DIMENSIONS.get(name.rpartition(".")[2])
        if dim is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def set_default_attributes(stages: Sequence[MegatronModule]) -> None:
    """Give each parameter without these attributes those of one that is whole; Megatron's optimizer reads them."""
    for stage in stages:
        for parameter in stage.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
