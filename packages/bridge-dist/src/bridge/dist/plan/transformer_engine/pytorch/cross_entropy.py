"""Fused cross entropy (``transformer_engine/pytorch/cross_entropy.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup

from .distributed import gather


class _CrossEntropy(torch.autograd.Function):
    """Keeps the gradient, which is written over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
        # Largest value, sum and the score of the label of each token.
        gather(logits.new_empty(3 * labels.numel(), dtype=torch.float32), group)
        ctx.save_for_backward(logits)
        return logits.new_empty(labels.shape, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        return torch.empty_like(logits), None, None


def parallel_cross_entropy(
    _input: torch.Tensor,
    target: torch.Tensor,
    label_smoothing: float = 0.0,
    reduce_loss: bool = False,
    dist_process_group: ProcessGroup | None = None,
    *_: object,
) -> torch.Tensor:
    """Return the shape of the loss of each token."""
    loss: torch.Tensor = _CrossEntropy.apply(_input, target, dist_process_group)
    return loss
