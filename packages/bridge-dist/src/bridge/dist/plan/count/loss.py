"""Memory that a loss takes when its backward pass starts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partialmethod
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule

from bridge.dist.patch import Replacement, replace_attributes


@contextlib.contextmanager
def record_logit_gradients() -> Iterator[list[int]]:
    """Collect the bytes of the gradients of the logits, for each loss that a language model computes."""
    sizes: list[int] = []

    def record(
        model: LanguageModule, compute: Callable[..., torch.Tensor], labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        sizes.append(logits.numel() * _count_bytes_per_logit(model, logits.dtype))
        return compute(model, labels, logits)

    compute: Any = LanguageModule.compute_language_model_loss
    recording = partialmethod(record, compute)
    with replace_attributes(Replacement(LanguageModule, "compute_language_model_loss", recording)):
        yield sizes


def _count_bytes_per_logit(model: LanguageModule, dtype: torch.dtype) -> int:
    """Return the bytes that the gradient of a logit takes beside its probability, which is kept in fp32.

    Read from megatron-core 0.19.2, Transformer Engine 2.17, and what torch 2.15 compiles.
    """
    config = model.config
    if not config.cross_entropy_loss_fusion:  # in place of the probability, then converted
        return 0 if dtype is torch.float32 else dtype.itemsize
    if config.cross_entropy_fusion_impl == "te":  # in place of the logit
        return 0
    return torch.float32.itemsize + torch.bfloat16.itemsize  # a new tensor, then always converted to bf16
