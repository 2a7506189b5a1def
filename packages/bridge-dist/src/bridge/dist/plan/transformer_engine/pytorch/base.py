"""What all layers share (``transformer_engine/pytorch/module/base.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup

from ..common.recipe import Recipe
from .fp8 import WeightStorage, quantize_weight


class Layer(torch.nn.Module):
    """A layer with parameters. ``_fp8_workspaces`` are copies of its weights in 8 bits, kept from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.tp_group: ProcessGroup | None = None
        self.holds_quantized_weights = WeightStorage.is_quantized
        self._fp8_workspaces: dict[str, list[torch.Tensor]] = {}

    def get_extra_state(self) -> torch.Tensor:
        """Return the state of scales, which is empty without 8-bit floats."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        """Ignore the state of scales."""

    def set_tensor_parallel_group(self, tp_group: ProcessGroup | None) -> None:
        """Set the group that splits the weights."""
        self.tp_group = tp_group

    def backward_dw(self) -> None:
        """Compute delayed gradients of weights; here they are computed in the backward pass."""

    def add_parameter(self, name: str, *shape: int, dtype: torch.dtype | None, device: Any) -> torch.nn.Parameter:
        """Register a new parameter, and return it."""
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.register_parameter(name, parameter)
        return parameter

    def quantized_weight(self, name: str, recipe: Recipe | None, *, caches: bool) -> list[torch.Tensor]:
        """Return a weight in 8 bits; nothing without a recipe, or if the weight itself is in 8 bits."""
        if recipe is None or self.holds_quantized_weights:
            return []
        if not caches:
            return quantize_weight(self.get_parameter(name), recipe)
        if name not in self._fp8_workspaces:
            self._fp8_workspaces[name] = quantize_weight(self.get_parameter(name), recipe)
        return self._fp8_workspaces[name]


def split_parameter(parameter: torch.nn.Parameter, dim: int) -> None:
    """Mark a parameter as split along a dimension over tensor-parallel ranks, as megatron-core does."""
    vars(parameter).update(tensor_model_parallel=True, partition_dim=dim, partition_stride=1)
