"""Norms (``transformer_engine/pytorch/ops/basic/rmsnorm.py`` and ``layer_norm.py``)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .base import Layer


def make_statistics(rows: torch.Tensor, *, has_mean: bool) -> list[torch.Tensor]:
    """Return the reciprocal deviation of each row and, if it is subtracted, the mean."""
    return [rows.new_empty(rows.shape[:-1].numel(), dtype=torch.float32) for _ in range(1 + has_mean)]


class _Norm(torch.autograd.Function):
    """Keeps the input and the statistics."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows, weight, *make_statistics(rows, has_mean=bias is not None))
        ctx.has_bias = bias is not None
        return torch.empty_like(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, *_ = ctx.saved_tensors
        return torch.empty_like(rows), torch.empty_like(weight), torch.empty_like(weight) if ctx.has_bias else None


class RMSNorm(Layer):
    """Root-mean-square norm."""

    has_bias: ClassVar[bool] = False

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        *,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        device: Any = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias") if self.has_bias else ("weight",):
            parameter = self.add_parameter(name, normalized_shape, dtype=params_dtype, device=device)
            vars(parameter)["sequence_parallel"] = sequence_parallel

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the shape of the normalised input."""
        normed: torch.Tensor = _Norm.apply(rows, self.weight, self.bias if self.has_bias else None)
        return normed


class LayerNorm(RMSNorm):
    """Layer norm."""

    has_bias = True
