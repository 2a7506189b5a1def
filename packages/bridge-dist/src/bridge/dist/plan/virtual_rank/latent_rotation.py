"""Fused rotation of multi-latent attention on the meta device, where the Triton kernels cannot run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.transformer import multi_latent_attention

from bridge.dist.patch import Replacement, replace_attributes


def rotate_latents_on_meta() -> AbstractContextManager[None]:
    """Return a context in which the kernels of megatron-core 0.19.2 have stand-ins that keep the same tensors.

    One rotates queries in place. The other makes keys and values. The angles are buffers of the embedding.
    """
    return replace_attributes(
        Replacement(multi_latent_attention, "fused_apply_mla_rope_for_q", lambda query, *_: query),
        Replacement(multi_latent_attention, "fused_apply_mla_rope_for_kv", _make_keys_and_values),
    )


class _KeysAndValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mixed: torch.Tensor, positions: torch.Tensor, key_width: int, value_width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.shapes = (mixed.shape, positions.shape)
        return mixed.new_empty(*mixed.shape[:-1], key_width), mixed.new_empty(*mixed.shape[:-1], value_width)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: object) -> tuple[torch.Tensor | None, ...]:
        return (*(gradient.new_empty(shape) for shape in ctx.shapes), None, None)


def _make_keys_and_values(
    mixed: torch.Tensor,
    positions: torch.Tensor,
    cos: object,
    sin: object,
    position_width: int,
    key_width: int,
    value_width: int,
    *_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    made: tuple[torch.Tensor, torch.Tensor] = _KeysAndValues.apply(
        mixed, positions, position_width + key_width, value_width
    )
    return made
