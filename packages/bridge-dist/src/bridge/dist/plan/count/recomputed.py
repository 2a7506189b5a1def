"""Moments at which activations that were not kept exist again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

from bridge.dist.patch import Replacement, replace_attributes


@contextlib.contextmanager
def watch_recomputation(look: Callable[[], object]) -> Iterator[None]:
    """Call ``look`` whenever a backward pass has recomputed a part of a model and is about to use it.

    The forward pass must run within the context, too. ``look`` is also called when the whole backward pass starts.
    """
    run_backward: Any = torch.autograd.backward
    recompute: Any = CheckpointWithoutOutput._recompute

    def look_and_run_backward(*args: Any, **kwargs: Any) -> None:
        look()
        run_backward(*args, **kwargs)

    def recompute_and_look(part: CheckpointWithoutOutput, gradient: torch.Tensor) -> None:
        recompute(part, gradient)
        look()

    with replace_attributes(
        # A recomputed part has a backward pass of its own, with megatron-core as with Transformer Engine.
        Replacement(torch.autograd, "backward", look_and_run_backward),
        # Except one of which only the output was discarded: it gets its memory back before.
        Replacement(CheckpointWithoutOutput, "_recompute", recompute_and_look),
    ):
        yield
