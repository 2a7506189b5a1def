"""Fused attention kernels for the meta device, and formulas for their FLOPs."""

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
    enable_gqa: bool = False,  # unused: the kernels infer it from the shapes
) -> torch.Tensor:
    """Compute attention with a kernel that saves queries, keys, values, the output and one number per output row.

    On the meta device, torch would compute and save the whole score matrix. The CPU kernel supports neither values
    that differ in width from queries nor a mask with a gradient; the GPU kernel is used for those.
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
    """Return a context in which torch computes attention with `_attend`.

    The function is replaced because a torch function mode would be off in the backward pass, where recomputation runs.
    """
    return replace_attributes(Replacement(torch.nn.functional, "scaled_dot_product_attention", _attend))


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    """Return the FLOPs of the scores and of their product with the values.

    The shapes are [batch, heads, length, width]; a product of [m, k] and [k, n] takes 2 m k n FLOPs.
    """
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward_flops(
    _: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *__: object, **___: object
) -> int:
    """Return the FLOPs of recomputing the scores and of two gradients for each of the two products.

    Scores and the gradients of queries and keys sum over the width of queries, the other two over that of values.
    """
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten._scaled_dot_product_efficient_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward: _attention_backward_flops,
}
"""FLOP formulas. torch 2.15 has all four; torch 2.11 lacks the first two and rejects grouped queries."""
