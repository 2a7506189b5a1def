"""Recipes for 8-bit floats, and the size of their scales (``transformer_engine/common/recipe/__init__.py``)."""

from __future__ import annotations

import enum
from typing import ClassVar

import torch


class Format(enum.Enum):
    """The formats of 8-bit floats: one for all tensors, or another one for gradients."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    """How tensors are scaled before they are stored in 8 bits.

    ``values_per_scale`` values share a scale of ``scale_dtype``; None: the whole tensor has one scale.
    """

    values_per_scale: ClassVar[int | None] = None
    values_per_weight_scale: ClassVar[int | None] = None
    scale_dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, *, fp8_format: Format = Format.HYBRID, fp8_dpa: bool = False, **_: object) -> None:
        self.fp8_format = fp8_format
        self.fp8_dpa = fp8_dpa


class DelayedScaling(Recipe):
    """One scale per tensor, from the largest values of earlier steps."""


class Float8CurrentScaling(Recipe):
    """One scale per tensor, from its own largest value."""


class Float8BlockScaling(Recipe):
    """One scale per 128 values, and per 128 x 128 values of a weight."""

    values_per_scale = 128
    values_per_weight_scale = 128 * 128


class MXFP8BlockScaling(Recipe):
    """One 8-bit scale per 32 values."""

    values_per_scale = 32
    values_per_weight_scale = 32
    scale_dtype = torch.uint8
