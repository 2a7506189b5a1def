"""Load the state of Megatron's optimizer, also where torch's Adam does the work.

Without Transformer Engine and Apex, Megatron's distributed optimizer (0.19.2) cannot load what it saved: torch's Adam
keeps its step as a tensor in the state of each parameter, which the functions for loading do not expect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.optimizer import DistributedOptimizer

from bridge.dist.patch import Replacement, replace_attributes

_STEP = "step"


def make_loading_state(optimizer: Any, model_state: dict[str, Any], *, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the sharded state dict to load an optimizer with, before its first step or later."""
    for one in _list_optimizers(optimizer):
        one.init_state_fn(one.optimizer, one.config)
        if isinstance(
            one.optimizer, torch.optim.Adam | torch.optim.AdamW
        ):  # those of Transformer Engine and Apex are not
            for tensors in one.optimizer.state.values():
                tensors.setdefault(_STEP, torch.tensor(0.0))
    state: dict[str, Any] = optimizer.sharded_state_dict(model_state, is_loading=True, metadata=metadata)
    return state


def set_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Set the state of an optimizer from a loaded one."""
    set_tensors: Callable[..., None] = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_tensors_without_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        set_tensors(self, model_param, {_STEP: None} | tensors)

    name = "_set_main_param_and_optimizer_states"
    with replace_attributes(Replacement(DistributedOptimizer, name, set_tensors_without_step)):
        optimizer.load_state_dict(state)
    for one in _list_optimizers(optimizer):
        for tensors in one.optimizer.state.values():
            if isinstance(tensors.get(_STEP), torch.Tensor):
                tensors[_STEP] = tensors[
                    _STEP
                ].clone()  # Megatron gives all parameters one tensor, which each counts up


def _list_optimizers(optimizer: Any) -> Iterator[Any]:
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not one.is_stub_optimizer:
            yield one
