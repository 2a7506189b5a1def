"""Padding of the tokens of each expert for 8-bit products (``transformer_engine/pytorch/module/fp8_padding.py``)."""

from __future__ import annotations

from typing import Any

import torch

from ..common.recipe import MXFP8BlockScaling
from .fp8 import FP8GlobalStateManager


class _Resize(torch.autograd.Function):
    """A copy with another number of rows; nothing is kept."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.shape = tokens.shape
        return tokens.new_empty(rows, *tokens.shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.new_empty(ctx.shape), None


class Fp8Padding(torch.nn.Module):
    """Pads the tokens of each expert to a multiple of 16, or of 32 for MXFP8."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.align_size = align_size

    def forward(self, tokens: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Return the padded tokens, and their numbers."""
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        multiple = self.align_size or (32 if isinstance(recipe, MXFP8BlockScaling) else 16)
        padded = [-(-size // multiple) * multiple for size in m_splits]
        if padded == m_splits:
            return tokens, padded
        resized: torch.Tensor = _Resize.apply(tokens, sum(padded))
        return resized, padded


class Fp8Unpadding(torch.nn.Module):
    """Removes the padding."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()

    def forward(self, tokens: torch.Tensor, m_splits: list[int]) -> torch.Tensor:
        """Return the tokens without padding."""
        resized: torch.Tensor = tokens if len(tokens) == sum(m_splits) else _Resize.apply(tokens, sum(m_splits))
        return resized
