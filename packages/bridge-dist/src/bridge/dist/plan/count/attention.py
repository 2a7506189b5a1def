"""Attention by kernels that keep little, on the meta device; and their FLOPs."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch

from bridge.dist.patch import Replacement, replace_attributes


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,  # the kernels see it in the shapes
) -> torch.Tensor:
    """Attention by kernels that keep queries, keys, values, the output and one number for each of its rows.

    On the meta device torch would compute, and keep, the whole matrix of scores. Where it has no such kernel on a CPU
    (for values of another width than queries, or a mask with a gradient) that of GPUs is taken.
    """
    mask = attn_mask
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    if query.shape[-1] == value.shape[-1] and not (mask is not None and mask.requires_grad):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]  # type: ignore[no-any-return]
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, mask, True, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]


def use_fused_attention() -> AbstractContextManager[None]:
    """Attend by `_attend` within a context.

    In recomputed passes too: torch switches function modes off in the backward pass.
    """
    return replace_attributes(Replacement(torch.nn.functional, "scaled_dot_product_attention", _attend))


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    """FLOPs of the scores, and of their product with the values."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward_flops(
    _: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *__: object, **___: object
) -> int:
    """FLOPs of the scores again, and of two gradients for each of the two products."""
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten._scaled_dot_product_efficient_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward: _attention_backward_flops,
}
"""torch 2.15 has formulas for all four; 2.11 counts nothing for the first two, and refuses grouped queries."""
