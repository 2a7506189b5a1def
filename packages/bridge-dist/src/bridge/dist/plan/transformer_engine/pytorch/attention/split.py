"""Splitting of the projected queries, keys and values (``attention/dot_product_attention/utils.py``)."""

from __future__ import annotations

from typing import Any

import torch


class _SplitAlongDim(torch.autograd.Function):
    """Views along a dimension; the backward pass joins their gradients."""

    @staticmethod
    def forward(ctx: Any, mixed: torch.Tensor, dim: int, sizes: int | list[int]) -> tuple[torch.Tensor, ...]:
        ctx.dim = dim
        return torch.split(mixed, sizes, dim=dim)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return torch.cat(gradients, dim=ctx.dim), None, None
