"""The recipe that is in force, and storage in 8 bits (``transformer_engine/pytorch/fp8.py``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..common.recipe import Recipe


class FP8GlobalStateManager:
    """The recipe of the ``fp8_autocast`` that the process is in; None outside of one."""

    recipe: Recipe | None = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Return whether layers compute in 8 bits."""
        return cls.recipe is not None

    @classmethod
    def get_fp8_recipe(cls) -> Recipe | None:
        """Return the recipe in force."""
        return cls.recipe


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Recipe | None = None, **_: object) -> Iterator[None]:
    """Let layers compute in 8 bits by a recipe."""
    before, FP8GlobalStateManager.recipe = FP8GlobalStateManager.recipe, fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = before


@contextlib.contextmanager
def fp8_model_init(enabled: bool = True, recipe: Recipe | None = None, **_: object) -> Iterator[None]:
    """Let layers hold their weights in 8 bits only.

    A weight stays a tensor in half precision, which has as many bytes as its two copies in 8 bits, one transposed.
    """
    before, WeightStorage.is_quantized = WeightStorage.is_quantized, enabled
    try:
        yield
    finally:
        WeightStorage.is_quantized = before


class WeightStorage:
    """Whether layers under construction hold their weights in 8 bits, and whether copies need a transposed one."""

    is_quantized = False
    needs_transposed = True


def quantize(tensor: torch.Tensor, recipe: Recipe) -> list[torch.Tensor]:
    """Return the data and the scales of a tensor in 8 bits."""
    return _store(tensor, recipe, values_per_scale=recipe.values_per_scale)


def quantize_weight(weight: torch.Tensor, recipe: Recipe) -> list[torch.Tensor]:
    """Return the data and the scales of a weight in 8 bits and, if it needs one, of its transpose.

    Before Blackwell, matrix products in 8 bits need both. Block scales run along one dimension, so they always do.
    """
    copies = 2 if WeightStorage.needs_transposed or recipe.values_per_scale is not None else 1
    values = recipe.values_per_weight_scale
    return [part for _ in range(copies) for part in _store(weight, recipe, values_per_scale=values)]


def _store(tensor: torch.Tensor, recipe: Recipe, *, values_per_scale: int | None) -> list[torch.Tensor]:
    scales = 1 if values_per_scale is None else -(-tensor.numel() // values_per_scale)
    return [
        tensor.new_empty(tensor.shape, dtype=torch.float8_e4m3fn),
        tensor.new_empty(scales, dtype=recipe.scale_dtype),
    ]
