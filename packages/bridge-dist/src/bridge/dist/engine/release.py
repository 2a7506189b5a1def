"""Letting go of models and process groups that megatron-core and torch would keep for ever."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from bridge.dist.internals import TESTED_THROUGHOUT, TORCH

_megatron_fsdp: weakref.WeakSet[Any] = weakref.WeakSet()
_meshes: weakref.WeakValueDictionary[int, DeviceMesh] = weakref.WeakValueDictionary()
"""By identity: meshes of the same ranks are equal."""


def remember_megatron_fsdp(wrapped: torch.nn.Module) -> None:
    """Remember a model that Megatron-FSDP wraps, for ``release_sharded_models``."""
    _megatron_fsdp.add(wrapped)


def remember_meshes(meshes: Iterable[DeviceMesh | None]) -> None:
    """Remember the meshes of a sharded model, for ``release_sharded_models``."""
    _meshes.update({id(mesh): mesh for mesh in meshes if mesh is not None})


def release_sharded_models() -> None:
    """Take from all models that an FSDP wraps, whose process groups are no more, what would keep those for ever.

    In megatron-core 0.19.2 a model that Megatron-FSDP wraps and its gradient hooks hold each other by way of torch's
    C++, so that Python never frees it. In torch 2.11 DTensor never frees the meshes it computes with, and a mesh holds
    its groups, with their threads and files; 2.15 frees them.
    """
    for wrapped in list(_megatron_fsdp):
        for handle in wrapped.grad_acc_hooks.values():
            handle.remove()
    _megatron_fsdp.clear()
    for mesh in list(_meshes.values()):
        vars(mesh).get("_pg_registry", {}).clear()  # torch 2.6 has none, and holds no groups
    _meshes.clear()


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
        # Which finds a mesh of then by its ranks too.
        importlib.import_module("torch.distributed.tensor._redistribute").clear_redistribute_planner_cache()
