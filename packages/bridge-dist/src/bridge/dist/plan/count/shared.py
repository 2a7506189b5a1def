"""Tensors that all microbatches share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partialmethod
from typing import Any

import torch
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding

from bridge.dist.patch import Replacement, replace_attributes


@contextlib.contextmanager
def record_shared_tensors() -> Iterator[list[torch.Tensor]]:
    """Collect the angles of rotary positions, which Megatron caches from the first microbatch on."""
    angles: list[torch.Tensor] = []

    def record(embedding: torch.nn.Module, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = compute(embedding, *args, **kwargs)
        angles.append(found[0] if isinstance(found, tuple) else found)
        return found

    kinds = (RotaryEmbedding, YarnRotaryEmbedding)
    with replace_attributes(*(Replacement(kind, "forward", partialmethod(record, kind.forward)) for kind in kinds)):
        yield angles
