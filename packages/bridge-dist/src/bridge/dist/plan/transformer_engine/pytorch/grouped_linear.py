"""Linear layers of experts (``transformer_engine/pytorch/module/grouped_linear.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup

from ..common.recipe import DelayedScaling, Recipe
from .base import Layer, split_parameter
from .fp8 import FP8GlobalStateManager, quantize


class _Products(torch.autograd.Function):
    """Products of the tokens of each expert. Keeps the tokens, in 8 bits with a recipe."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: torch.Tensor,
        splits: list[int],
        recipe: Recipe | None,
        quantized_weights: list[torch.Tensor],
        has_biases: bool,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        weights = parameters[: len(splits)]
        output = torch.cat([part @ weight.t() for part, weight in zip(tokens.split(splits), weights, strict=True)])
        if recipe is None:
            kept = [tokens]
        else:
            kept = [stored for part in tokens.split(splits) for stored in quantize(part, recipe)]
        ctx.save_for_backward(*weights, *kept, *quantized_weights)
        ctx.splits, ctx.shape, ctx.has_biases = splits, tokens.shape, has_biases
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        splits: list[int] = ctx.splits
        weights = ctx.saved_tensors[: len(splits)]
        gradients, tokens = gradient.split(splits), gradient.new_empty(ctx.shape).split(splits)
        of_tokens = torch.cat([part @ weight for part, weight in zip(gradients, weights, strict=True)])
        of_weights = [part.t() @ inputs for part, inputs in zip(gradients, tokens, strict=True)]
        of_biases = [weight.new_empty(weight.shape[0]) for weight in weights] if ctx.has_biases else []
        return (of_tokens, None, None, None, None, *of_weights, *of_biases)


class GroupedLinear(Layer):
    """A linear layer per expert."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        tp_group: ProcessGroup | None = None,
        tp_size: int = 1,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        params_dtype: torch.dtype | None = None,
        device: Any = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.in_features = in_features // tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // tp_size if parallel_mode == "column" else out_features
        self.num_gemms, self.use_bias, self.return_bias = num_gemms, bias, return_bias
        self.tp_group, self.tp_size, self.save_original_input = tp_group, tp_size, False
        for index in range(num_gemms):
            weight = self.add_parameter(
                f"weight{index}", self.out_features, self.in_features, dtype=params_dtype, device=device
            )
            split_parameter(weight, 1 if parallel_mode == "row" else 0)
        for index in range(num_gemms if bias else 0):
            self.add_parameter(f"bias{index}", self.out_features, dtype=params_dtype, device=device)

    def forward(
        self, tokens: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.nn.Parameter]]:
        """Return the shape of the products of the tokens of each expert, with the biases if added later."""
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        names = [f"weight{index}" for index in range(self.num_gemms)]
        caches = is_first_microbatch is not None
        quantized = [part for name in names for part in self.quantized_weight(name, recipe, caches=caches)]
        biases = [self.get_parameter(f"bias{index}") for index in range(self.num_gemms if self.use_bias else 0)]
        added = [] if self.return_bias else biases
        keeps_input = self.save_original_input and not isinstance(recipe, DelayedScaling)
        output: torch.Tensor = _Products.apply(
            tokens,
            [int(size) for size in m_splits],
            None if keeps_input else recipe,
            quantized,
            bool(added),
            *map(self.get_parameter, names),
            *added,
        )
        return (output, biases) if self.return_bias else output
