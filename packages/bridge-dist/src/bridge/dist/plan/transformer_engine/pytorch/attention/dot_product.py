"""Attention by cuDNN: ``backends.py`` and ``context_parallel.py`` in ``attention/dot_product_attention``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ...common.recipe import DelayedScaling, Recipe
from ..base import Layer
from ..distributed import gather, reduce_scatter
from ..fp8 import FP8GlobalStateManager, quantize


class _Context(NamedTuple):
    """The group that splits the sequence, how its ranks exchange keys and values, and whether the mask is causal."""

    group: ProcessGroup | None
    kind: str
    is_causal: bool

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    def exchange(self, *tensors: torch.Tensor, rounds: int = 1) -> None:
        """Send the keys and values of this rank, or their gradients, to the others."""
        if self.group is None or self.ranks == 1:
            return
        for tensor in tensors:
            if self.kind == "all_gather":
                gather(tensor, self.group)
            elif self.kind == "a2a":
                dist.all_to_all_single(torch.empty_like(tensor), tensor.contiguous(), group=self.group)
            else:
                # A ring: each rank passes on what it received, until all have seen everything.
                for _ in range((self.ranks - 1) * rounds):
                    dist.send(tensor, group=self.group, group_dst=(self.group.rank() + 1) % self.ranks)


class _Attention(torch.autograd.Function):
    """Keeps queries, keys, values, the output, one number per row of scores, and the random state.

    Under context parallelism, they are those of this rank's part of the sequence or, with all-to-all, of as many heads
    of the whole sequence. The kernels of torch count the FLOPs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        sink: torch.Tensor | None,
        context: _Context,
        recipe: Recipe | None,
    ) -> torch.Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        context.exchange(*_exchanged(context, query, key, value))
        rows = _attend(query, key, value, context)
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        if context.kind == "a2a":
            context.exchange(output)
        kept = [query, key, value, output]
        if recipe is not None:
            # With one scale per tensor from earlier steps, the output is stored in 8 bits too.
            count = 4 if isinstance(recipe, DelayedScaling) else 3
            kept = [part for one in kept[:count] for part in quantize(one, recipe)] + kept[count:]
        others = [one for one in (bias, sink) if one is not None]
        ctx.save_for_backward(*kept, rows, rows.new_empty(2, dtype=torch.int64), *others)
        ctx.shapes, ctx.dtype, ctx.context = (query.shape, key.shape, value.shape), query.dtype, context
        ctx.others = [None if one is None else (one.shape, one.dtype) for one in (bias, sink)]
        return output.flatten(2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        context: _Context = ctx.context
        query, key, value = (gradient.new_empty(shape, dtype=ctx.dtype) for shape in ctx.shapes)
        _attend_backward(query, key, value, context)
        if context.kind == "a2a":
            context.exchange(query, query, key, value)
        elif context.kind == "all_gather":
            context.exchange(key, value)
            if context.ranks > 1:
                for one in (key, value):
                    reduce_scatter(one.new_empty(one.shape[0] * context.ranks, *one.shape[1:]), context.group)
        else:
            context.exchange(key, value, rounds=2)  # with their gradients
        others = (None if one is None else gradient.new_empty(one[0], dtype=one[1]) for one in ctx.others)
        return (query, key, value, *others, None, None)


def _exchanged(context: _Context, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    return [query, key, value] if context.kind == "a2a" else [key, value]


def _by_head(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: _Context) -> list[torch.Tensor]:
    """Return the tensors as [batch, heads, sequence, width], keys and values with the whole sequence."""
    parts = [query.new_empty(one.shape[1], one.shape[2], one.shape[0], one.shape[3]) for one in (query, key, value)]
    for index in (1, 2):
        batch, heads, length, width = parts[index].shape
        parts[index] = query.new_empty(batch, heads, length * context.ranks, width)
    return parts


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: _Context) -> torch.Tensor:
    """Run a kernel of torch, and return a number per row of scores in full precision."""
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    kernel(*_by_head(query, key, value, context), None, True, 0.0, context.is_causal)
    length, batch, heads, _ = query.shape
    return query.new_empty(batch, heads, length, 1, dtype=torch.float32)


def _attend_backward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: _Context) -> None:
    parts = _by_head(query, key, value, context)
    rows = query.new_empty(*parts[0].shape[:-1], dtype=torch.float32)
    output = query.new_empty(*parts[0].shape[:-1], value.shape[-1])
    seed = query.new_empty((), dtype=torch.int64)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention_backward
    kernel(output, *parts, None, output, rows, seed, seed, 0.0, [True, True, True, False], context.is_causal)


class DotProductAttention(Layer):
    """Attention between projected queries, keys and values, each [sequence, batch, heads, width]."""

    def __init__(
        self,
        num_attention_heads: int,
        *,
        tp_size: int = 1,
        tp_group: ProcessGroup | None = None,
        cp_group: ProcessGroup | None = None,
        cp_comm_type: str = "p2p",
        softmax_type: str = "vanilla",
        attn_mask_type: str = "causal",
        **_: object,
    ) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.cp_group, self.cp_comm_type, self.attn_mask_type = cp_group, cp_comm_type, attn_mask_type
        if softmax_type == "learnable":
            self.softmax_offset = torch.nn.Parameter(torch.empty(num_attention_heads // tp_size, device="cuda"))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: object = None,
        *,
        attn_mask_type: str | None = None,
        core_attention_bias: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        """Return the shape of the output, [sequence, batch, heads x width of values]."""
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        output: torch.Tensor = _Attention.apply(
            query,
            key,
            value,
            core_attention_bias,
            getattr(self, "softmax_offset", None),
            _Context(self.cp_group, self.cp_comm_type, "causal" in (attn_mask_type or self.attn_mask_type)),
            recipe if recipe is not None and recipe.fp8_dpa else None,
        )
        return output
