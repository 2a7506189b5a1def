"""Make losses independent of the layout: no dropout, and no probability for vocabulary padding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.transformer import MegatronModule, TransformerConfig

from bridge.dist.document_layout import DROPOUT_RATES
from bridge.dist.engine.stages import unwrap


def switch_off_dropout(config: TransformerConfig) -> list[str]:
    """Set the dropout rates of a configuration to zero and return the names of those that were not.

    Each tensor-parallel rank draws its own dropout masks, so with dropout the losses depend on the layout.
    """
    names = [name for name in DROPOUT_RATES if getattr(config, name)]
    for name in names:
        setattr(config, name, 0.0)
    return names


def mask_vocabulary_padding(stages: Sequence[MegatronModule], *, vocab_size: int) -> None:
    """Mask the logits of vocabulary padding, in stages with an output layer.

    The number of padding rows depends on the tensor-parallel size, and without a mask they take part in the softmax.
    """
    for stage in stages:
        layer = getattr(unwrap(stage), "output_layer", None)
        if layer is not None:
            layer.register_forward_hook(partial(_mask_padding, vocab_size=vocab_size))


def _mask_padding(
    layer: Any, _: object, output: tuple[torch.Tensor, torch.Tensor | None], *, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    logits, bias = output
    width = logits.shape[-1]
    real = vocab_size - layer.tp_group.rank() * width
    if real >= width:
        return output
    padding = torch.arange(width, device=logits.device) >= real
    return logits.masked_fill(padding, torch.finfo(logits.dtype).min), bias
