"""Fused operations, which plans refuse; megatron-core 0.19.2 names these classes when it is imported."""

from __future__ import annotations

import torch


class FusibleOperation(torch.nn.Module):
    """An operation that can be fused with others."""


class Sequential(torch.nn.Module):
    """A sequence of operations."""
