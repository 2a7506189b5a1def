"""Sorting of tokens by expert (``transformer_engine/pytorch/permutation.py``). A map of rows is kept."""

from __future__ import annotations

from typing import Any

import torch


class _Permutation(torch.autograd.Function):
    """Copies each token once per chosen expert, with its probability."""

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, probs: torch.Tensor | None, routing_map: torch.Tensor, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        row_map = tokens.new_empty(len(tokens), 2 * routing_map.shape[1] + 1, dtype=torch.int32)
        ctx.save_for_backward(row_map)
        ctx.mark_non_differentiable(row_map)
        ctx.inputs = [None if one is None else (one.shape, one.dtype) for one in (tokens, probs)]
        chosen = None if probs is None else probs.new_empty(rows)
        return tokens.new_empty(rows, *tokens.shape[1:]), chosen, row_map

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: object) -> tuple[torch.Tensor | None, ...]:
        of_inputs = (None if one is None else gradient.new_empty(one[0], dtype=one[1]) for one in ctx.inputs)
        return (*of_inputs, None, None)


class _Move(torch.autograd.Function):
    """Moves rows by a map; ``row_map`` is kept."""

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, probs: torch.Tensor | None, row_map: torch.Tensor, shape: torch.Size
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.save_for_backward(row_map)
        ctx.inputs = [None if one is None else (one.shape, one.dtype) for one in (tokens, probs)]
        return tokens.new_empty(shape), None if probs is None else torch.empty_like(probs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: object) -> tuple[torch.Tensor | None, ...]:
        of_inputs = (None if one is None else gradient.new_empty(one[0], dtype=one[1]) for one in ctx.inputs)
        return (*of_inputs, None, None)


def moe_permute_with_probs(
    inp: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int = -1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the shapes of sorted tokens, their probabilities and the map of rows."""
    permuted: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _Permutation.apply(
        inp, probs, routing_map, num_out_tokens
    )
    return permuted


def moe_permute(
    inp: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int = -1, **_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the shapes of sorted tokens and the map of rows."""
    tokens, _probs, row_map = _Permutation.apply(inp, None, routing_map, num_out_tokens)
    return tokens, row_map


def moe_unpermute(
    inp: torch.Tensor,
    row_id_map: torch.Tensor,
    merging_probs: torch.Tensor | None = None,
    restore_shape: torch.Size | None = None,
    **_: object,
) -> torch.Tensor:
    """Return the shape of the tokens in their former order."""
    assert merging_probs is None  # megatron-core 0.19.2 applies them in the experts
    tokens: torch.Tensor = _Move.apply(inp, None, row_id_map, restore_shape)[0]
    return tokens


def moe_sort_chunks_by_index_with_probs(
    inp: torch.Tensor, probs: torch.Tensor, split_sizes: torch.Tensor, sorted_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the shapes of chunks of tokens in another order, and of their probabilities."""
    row_map = inp.new_empty(len(inp), dtype=torch.int32)
    moved: tuple[torch.Tensor, torch.Tensor] = _Move.apply(inp, probs, row_map, inp.shape)
    return moved


def moe_sort_chunks_by_index(inp: torch.Tensor, split_sizes: torch.Tensor, sorted_index: torch.Tensor) -> torch.Tensor:
    """Return the shape of chunks of tokens in another order."""
    tokens: torch.Tensor = _Move.apply(inp, None, inp.new_empty(len(inp), dtype=torch.int32), inp.shape)[0]
    return tokens
