"""The fused norm of torch on a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from bridge.dist.patch import Replacement, replace_attributes


def use_fused_norms() -> AbstractContextManager[None]:
    """Return a context in which a root-mean-square norm saves what it does on a GPU.

    That is the input and a number per row. torch computes it by several operations on other devices, also on the meta
    device, and they save two tensors in full precision.
    """
    return replace_attributes(Replacement(torch.nn.functional, "rms_norm", _normalize))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor | None, width: int) -> torch.Tensor:
        ctx.save_for_backward(rows, weight, rows.new_empty(rows.numel() // width, dtype=torch.float32))
        return torch.empty_like(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, _ = ctx.saved_tensors
        return torch.empty_like(rows), None if weight is None else torch.empty_like(weight), None


def _normalize(
    input: torch.Tensor,  # noqa: A002 - torch's name
    normalized_shape: list[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    normed: torch.Tensor = _RMSNorm.apply(input, weight, torch.Size(normalized_shape).numel())
    return normed
