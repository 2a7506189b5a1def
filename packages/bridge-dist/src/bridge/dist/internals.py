"""What bridge-dist uses of torch that torch does not promise to keep, in more than one place."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

TESTED_THROUGHOUT = (2, 11)
"""The oldest torch that everything is tested with; plans and both FSDPs want it.

Seen with torch 2.6: collectives of tensors without memory are refused, which plans are made of, Megatron-FSDP crashes
in the first step, and FSDP2 misses a method of streams. With 2.8 FSDP2 makes gradients on gloo as many times too large
as there are ranks.
"""


def clear_sharding_caches() -> None:
    """Let DTensor forget what it once computed, with the groups of then, for any mesh of the same ranks.

    ``torch.distributed.tensor.debug`` has a function for it, in a module that imports torch's compiler (torch 2.15).
    """
    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    if TORCH < TESTED_THROUGHOUT:  # seen in 2.6: the only cache is Python's
        propagator.propagate_op_sharding.cache.cache_clear()
    else:
        propagator.propagate_op_sharding.cache_clear()
        torch._C._clear_DTensor_sharding_propagator_cache()
