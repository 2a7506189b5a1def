"""Linear layers (``transformer_engine/pytorch/module/linear.py`` and ``layernorm_linear.py``)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup

from ..common.recipe import DelayedScaling, Recipe
from .base import Layer, split_parameter
from .distributed import all_reduce, gather, reduce_scatter
from .fp8 import FP8GlobalStateManager, quantize
from .norms import make_statistics


class _Way(NamedTuple):
    """How a layer computes: its split (``column``, ``row`` or None), the group, and the recipe for 8 bits.

    ``keeps_input`` keeps the input as it came, not in 8 bits.
    """

    mode: str | None
    gathers: bool
    group: ProcessGroup | None
    recipe: Recipe | None
    keeps_input: bool


class _Product(torch.autograd.Function):
    """A linear layer, after a norm if there is a weight for one.

    Keeps the input of the norm and its statistics, and the input of the product: this rank's part of the sequence,
    which the backward pass gathers again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        norm_bias: torch.Tensor | None,
        quantized_weight: list[torch.Tensor],
        way: _Way,
    ) -> torch.Tensor:
        before: list[torch.Tensor] = []
        normed = inputs
        if norm_weight is not None:
            inputs = inputs.contiguous()
            before = [inputs, norm_weight, *make_statistics(inputs, has_mean=norm_bias is not None)]
            normed = torch.empty_like(inputs)
        stored = [normed] if way.recipe is None else quantize(normed, way.recipe)
        whole = _gather(stored[0], way, weight.dtype, mode="column")
        output = whole @ weight.t()
        if way.mode == "row":
            output = (reduce_scatter if way.gathers else all_reduce)(output, way.group)
        kept = [normed] if way.keeps_input else stored
        if not ctx.needs_input_grad[1]:  # only the gradient of the weight needs the input
            kept = []
        ctx.save_for_backward(weight, *kept, *before, *quantized_weight)
        ctx.way, ctx.shape, ctx.has_bias = way, inputs.shape, bias is not None
        ctx.norm_shapes = [None if one is None else one.shape for one in (norm_weight, norm_bias)]
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        way: _Way = ctx.way
        weight, *kept = ctx.saved_tensors
        if way.mode == "row" and way.gathers and way.recipe is not None:
            gradient = quantize(gradient, way.recipe)[0]
        gradient = _gather(gradient, way, weight.dtype, mode="row")
        of_input = gradient @ weight
        if way.mode == "column":
            of_input = (reduce_scatter if way.gathers else all_reduce)(of_input, way.group)
        of_weight = None
        if ctx.needs_input_grad[1]:
            stored = quantize(kept[0], way.recipe)[0] if way.recipe is not None and way.keeps_input else kept[0]
            whole = _gather(stored, way, weight.dtype, mode="column")
            of_weight = gradient.flatten(0, -2).t() @ whole.flatten(0, -2)
        return (
            of_input.view(ctx.shape),
            of_weight,
            weight.new_empty(weight.shape[0]) if ctx.has_bias else None,
            *(None if shape is None else weight.new_empty(shape) for shape in ctx.norm_shapes),
            None,
            None,
        )


def _gather(part: torch.Tensor, way: _Way, dtype: torch.dtype, *, mode: str) -> torch.Tensor:
    """Gather the sequence if a layer with this split does so, and return it in the type of the products."""
    return (gather(part, way.group) if way.gathers and way.mode == mode else part).to(dtype)


class Linear(Layer):
    """A linear layer, split over the columns or rows of its weight."""

    can_keep_input = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool = False,
        tp_group: ProcessGroup | None = None,
        tp_size: int = 1,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        params_dtype: torch.dtype | None = None,
        device: Any = None,
        normalization: str | None = None,
        eps: float = 1e-5,
        **_: object,
    ) -> None:
        super().__init__()
        if self.can_keep_input:
            self.save_original_input = False
        self.in_features = in_features // tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // tp_size if parallel_mode == "column" else out_features
        self.parallel_mode, self.use_bias, self.return_bias = parallel_mode, bias, return_bias
        self.tp_group, self.tp_size, self.eps = tp_group, tp_size, eps
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.normalization = normalization
        add = partial(self.add_parameter, dtype=params_dtype, device=device)
        for part in ("weight", "bias") if normalization == "LayerNorm" else ("weight",) if normalization else ():
            vars(add(f"layer_norm_{part}", in_features))["sequence_parallel"] = self.sequence_parallel
        split_parameter(add("weight", self.out_features, self.in_features), 1 if parallel_mode == "row" else 0)
        if not bias:
            self.bias = None
        elif parallel_mode == "row":
            vars(add("bias", self.out_features))["sequence_parallel"] = self.sequence_parallel
        else:
            parameter = add("bias", self.out_features)
            if parallel_mode == "column":
                split_parameter(parameter, 0)

    def forward(
        self, inputs: torch.Tensor, is_first_microbatch: bool | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.nn.Parameter | None]:
        """Return the shape of the product, with the bias if it is to be added later."""
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        keeps_input = getattr(self, "save_original_input", False) and not isinstance(recipe, DelayedScaling)
        output: torch.Tensor = _Product.apply(
            inputs,
            self.weight,
            None if self.return_bias else self.bias,
            getattr(self, "layer_norm_weight", None),
            getattr(self, "layer_norm_bias", None),
            self.quantized_weight("weight", recipe, caches=is_first_microbatch is not None),
            _Way(self.parallel_mode, self.sequence_parallel, self.tp_group, recipe, keeps_input),
        )
        return (output, self.bias) if self.return_bias else output


class LayerNormLinear(Linear):
    """A norm and a linear layer."""

    can_keep_input = False
