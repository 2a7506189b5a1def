"""Tensors in 8 bits. No tensor of the stand-in is one: see ``fp8_model_init``."""

from __future__ import annotations

import torch


class QuantizedTensor(torch.Tensor):
    """A tensor in 8 bits."""
