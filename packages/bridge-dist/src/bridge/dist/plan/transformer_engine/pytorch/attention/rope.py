"""Fused rotary positions (``transformer_engine/pytorch/attention/rope.py``)."""

from __future__ import annotations

from typing import Any

import torch


class _Rotation(torch.autograd.Function):
    """Keeps the angles only."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(angles)
        return torch.empty_like(heads, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.empty_like(gradient), None


def apply_rotary_pos_emb(t: torch.Tensor, freqs: torch.Tensor, **_: object) -> torch.Tensor:
    """Return the shape of the rotated queries or keys."""
    rotated: torch.Tensor = _Rotation.apply(t, freqs)
    return rotated
