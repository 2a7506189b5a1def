"""Collectives, recomputation and random states (``transformer_engine/pytorch/distributed.py``)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from .fp8 import FP8GlobalStateManager, fp8_autocast


def gather(part: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Gather the parts of a tensor, split along its first dimension."""
    if group is None or group.size() == 1:
        return part
    whole = part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole


def reduce_scatter(whole: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Sum a tensor over the ranks of a group and return this rank's part, split along the first dimension."""
    if group is None or group.size() == 1:
        return whole
    part = whole.new_empty(whole.shape[0] // group.size(), *whole.shape[1:])
    dist.reduce_scatter_tensor(part, whole.contiguous(), group=group)
    return part


def all_reduce(tensor: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Sum a tensor over the ranks of a group."""
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: object = None,
    tp_group: object = None,
    **kwargs: Any,
) -> Any:
    """Keep the inputs of a function only, and recompute the rest in the backward pass, with the same recipe."""
    recipe = FP8GlobalStateManager.get_fp8_recipe()

    def run(*inputs: Any) -> Any:
        with fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
            return function(*inputs, **kwargs)

    return torch_checkpoint(run, *args, use_reentrant=True, preserve_rng_state=False)


@contextlib.contextmanager
def activation_recompute_forward(**_: object) -> Iterator[None]:
    """Mark a pass as one to recompute, or as its recomputation."""
    yield


class CudaRNGStatesTracker:
    """Named random states. Nothing is drawn on the meta device."""

    def __init__(self) -> None:
        self._states: dict[str, Any] = {}

    def reset(self) -> None:
        """Forget all states."""
        self._states = {}

    def get_states(self) -> dict[str, Any]:
        """Return all states."""
        return dict(self._states)

    def set_states(self, states: dict[str, Any]) -> None:
        """Set all states."""
        self._states = states

    def add(self, name: str, seed: int) -> None:
        """Add a state."""
        self._states[name] = seed

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from a state within a context."""
        yield
