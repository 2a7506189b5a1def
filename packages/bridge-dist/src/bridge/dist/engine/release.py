"""Release models, CUDA graphs and process groups that megatron-core and torch would otherwise keep alive."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.cuda_graphs import CudaGraphManager, delete_cuda_graphs
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from bridge.dist.internals import TESTED_THROUGHOUT, TORCH

_graphed: weakref.WeakSet[CudaGraphManager] = weakref.WeakSet()
_megatron_fsdp: weakref.WeakSet[Any] = weakref.WeakSet()
_meshes: weakref.WeakValueDictionary[int, DeviceMesh] = weakref.WeakValueDictionary()
"""Keyed by identity, because meshes of the same ranks compare equal."""


def remember_cuda_graphs(stages: Iterable[torch.nn.Module]) -> None:
    """Remember the layers that megatron-core computes with a CUDA graph each, for ``release_cuda_graphs``."""
    _graphed.update(module for stage in stages for module in stage.modules() if isinstance(module, CudaGraphManager))


def release_cuda_graphs() -> None:
    """Delete the CUDA graphs of layers.

    NCCL waits forever for graphs that contain its operations before it destroys a group. megatron-core 0.19.2 keeps in
    a global that graphs were captured, so that no later model of the process could capture its own, and its own
    function deletes only graphs that are recorded but not captured.
    """
    if not _graphed:
        return
    for manager in list(_graphed):
        for runner in manager.cudagraph_runners:
            runner.fwd_graph = runner.bwd_graph = None
    _graphed.clear()
    delete_cuda_graphs()


def remember_megatron_fsdp(wrapped: torch.nn.Module) -> None:
    """Remember a model that Megatron-FSDP wraps, for ``release_sharded_models``."""
    _megatron_fsdp.add(wrapped)


def remember_meshes(meshes: Iterable[DeviceMesh | None]) -> None:
    """Remember the meshes of a sharded model, for ``release_sharded_models``."""
    _meshes.update({id(mesh): mesh for mesh in meshes if mesh is not None})


def release_sharded_models() -> None:
    """Break the references that keep FSDP-wrapped models and their destroyed process groups alive.

    In megatron-core 0.19.2 a Megatron-FSDP model and its gradient hooks form a reference cycle through torch's C++,
    which Python never frees. In torch 2.11 DTensor never frees the meshes it computes with, and a mesh holds its
    groups, with their threads and files; 2.15 frees them.
    """
    for wrapped in list(_megatron_fsdp):
        for handle in wrapped.grad_acc_hooks.values():
            handle.remove()
    _megatron_fsdp.clear()
    for mesh in list(_meshes.values()):
        vars(mesh).get("_pg_registry", {}).clear()  # torch 2.6 has none, and holds no groups
    _meshes.clear()


def clear_sharding_caches() -> None:
    """Clear DTensor's caches, which hold destroyed groups and would return them for a new mesh of the same ranks.

    ``torch.distributed.tensor.debug`` has a function for this, but importing it imports torch's compiler (torch 2.15).
    """
    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    if TORCH < TESTED_THROUGHOUT:  # seen in 2.6: the only cache is Python's
        propagator.propagate_op_sharding.cache.cache_clear()
    else:
        propagator.propagate_op_sharding.cache_clear()
        torch._C._clear_DTensor_sharding_propagator_cache()
        # This cache also finds an old mesh by its ranks.
        importlib.import_module("torch.distributed.tensor._redistribute").clear_redistribute_planner_cache()
