"""The router of experts (``transformer_engine/pytorch/router.py``)."""

from __future__ import annotations

from typing import Any

import torch


class _Scores(torch.autograd.Function):
    """Scores of all experts, and the map of chosen ones. Keeps the map and an intermediate tensor of scores."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routing_map = torch.empty_like(logits, dtype=torch.bool)
        ctx.save_for_backward(routing_map, torch.empty_like(logits, dtype=torch.float32))
        ctx.mark_non_differentiable(routing_map)
        return torch.empty_like(logits), routing_map

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: object) -> torch.Tensor:
        return torch.empty_like(gradient)


class _AuxiliaryScores(torch.autograd.Function):
    """Scores for the auxiliary loss, which are kept in full precision."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.empty_like(logits, dtype=torch.float32)
        routing_map = torch.empty_like(logits, dtype=torch.bool)
        ctx.save_for_backward(torch.empty_like(scores))
        ctx.mark_non_differentiable(routing_map)
        ctx.dtype = logits.dtype
        return routing_map, scores

    @staticmethod
    def backward(ctx: Any, _: object, gradient: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(gradient, dtype=ctx.dtype)


class _AuxiliaryLoss(torch.autograd.Function):
    """The auxiliary loss. Keeps a scalar and the number of tokens of each expert."""

    @staticmethod
    def forward(ctx: Any, probs: torch.Tensor, tokens_per_expert: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens_per_expert)
        ctx.shape, ctx.dtype = probs.shape, probs.dtype
        return probs.new_empty(())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.new_empty(ctx.shape, dtype=ctx.dtype), None


def fused_topk_with_score_function(logits: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the shapes of the scores and of the map of chosen experts."""
    scores: tuple[torch.Tensor, torch.Tensor] = _Scores.apply(logits)
    return scores


def fused_compute_score_for_moe_aux_loss(logits: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the shapes of the map of chosen experts and of the scores for the auxiliary loss."""
    scores: tuple[torch.Tensor, torch.Tensor] = _AuxiliaryScores.apply(logits)
    return scores


def fused_moe_aux_loss(probs: torch.Tensor, tokens_per_expert: torch.Tensor, **_: object) -> torch.Tensor:
    """Return the shape of the auxiliary loss."""
    loss: torch.Tensor = _AuxiliaryLoss.apply(probs, tokens_per_expert)
    return loss
