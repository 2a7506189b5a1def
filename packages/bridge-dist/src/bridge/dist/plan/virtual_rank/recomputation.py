"""Recomputation on the meta device."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from megatron.core.tensor_parallel import random

from bridge.dist.patch import Replacement, replace_attributes


def recompute_on_meta() -> AbstractContextManager[None]:
    """Return a context in which a discarded output gets its memory back without a compiled extension.

    megatron-core 0.19.2 compiles a function that makes two tensors share their memory when it first recomputes one.
    """
    return replace_attributes(Replacement(random, "_get_share_storage", lambda: _restore_size))


def _restore_size(discarded: torch.Tensor, computed: torch.Tensor) -> None:
    discarded.untyped_storage().resize_(computed.untyped_storage().nbytes())
