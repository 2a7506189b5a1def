"""Patches that let Megatron-FSDP and torch FSDP2 run on the meta device."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial, partialmethod
from typing import Any

import torch
from megatron.core.distributed import FullyShardedDataParallel
from megatron.core.distributed.fsdp.src.megatron_fsdp import megatron_fsdp, param_and_grad_buffer
from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import MegatronFSDP
from megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer import ParamAndGradBuffer
from torch.distributed.tensor import DTensor

from bridge.dist.engine import meta
from bridge.dist.engine.release import clear_sharding_caches, release_sharded_models
from bridge.dist.patch import Replacement, replace_attributes

_META = torch.device("meta")


@contextlib.contextmanager
def allow_sharding_on_meta() -> Iterator[None]:
    """Let Megatron-FSDP and torch FSDP2 wrap and run stages on the meta device within a context.

    A plan needs none of the values that they would compute. `_replacements` lists the functions that fail there.
    """
    with replace_attributes(*_replacements()):
        try:
            yield
        finally:
            # Otherwise, both keep the process groups of this plan for the next one; see `destroy_process_groups`.
            release_sharded_models()
            clear_sharding_caches()


def _replacements() -> list[Replacement]:
    """Return the replacements for megatron-core 0.19.2 and torch 2.15; a test fails when one is no longer needed."""
    from torch.distributed.fsdp._fully_shard import _fully_shard
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    # `import_module`, because a function of the same name hides the module.
    finalize_model_grads = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    members = cache(lambda parent: frozenset(parent.modules()))
    return [
        # Meta tensors have no values to initialise.
        Replacement(meta, "initialise_while_wrapping", lambda *_: contextlib.nullcontext()),
        Replacement(meta, "initialise_shards", _do_nothing),
        # Megatron-FSDP reads values from its tensor of ranks, which therefore must be on the CPU.
        _wrap_method(FullyShardedDataParallel, "_init_dist_index", lambda: torch.device("cpu")),
        # It requires parameters to be off the meta device once they have their buffers.
        _wrap_method(
            ParamAndGradBuffer,
            "_init_each_parameter_group_buffers",
            lambda: replace_attributes(Replacement(torch.Tensor, "is_meta", False)),
        ),
        # Exchanges between ranks, which deliver nothing here: states of random generators, and the offsets of each
        # rank's shards for checkpoints.
        Replacement(FullyShardedDataParallel, "sync_rng_states_across_tp_group", _do_nothing),
        Replacement(
            param_and_grad_buffer,
            "make_fsdp_dtensor",
            partial(_call_unchecked, param_and_grad_buffer.make_fsdp_dtensor),
        ),
        # It searches all modules for each module, which takes most of the time of a plan with many layers.
        *(
            Replacement(module, "is_submodule", lambda child, parent: child is not parent and child in members(parent))
            for module in (megatron_fsdp, param_and_grad_buffer)
        ),
        Replacement(
            MegatronFSDP, "_register_fsdp_hooks", partialmethod(_register_from_list, MegatronFSDP._register_fsdp_hooks)
        ),
        # FSDP2 takes the device of its buffers from the mesh, and its streams from the torch module of that name.
        Replacement(_fully_shard, "_get_device_from_mesh", lambda mesh: _META),
        Replacement(torch, "meta", torch.cuda),
        # It refuses to run on the meta device.
        Replacement(FSDPParamGroup, "_validate_no_meta_params", _do_nothing),
        # On the meta device, DTensor splits tensors but sends nothing; `_scatter` sends, so that it is counted.
        Replacement(finalize_model_grads, "_reshard_if_dtensor", _scatter),
    ]


def _do_nothing(*_: object) -> None:
    pass


def _scatter(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Scatter a gradient from the first rank, as a DTensor like ``like``; return ``like`` if it is no DTensor."""
    if not isinstance(like, DTensor):
        return like
    part, mesh = torch.empty_like(like.to_local()), like.device_mesh
    parts = [part] * mesh.size() if mesh.get_local_rank() == 0 else None
    torch.distributed.scatter(part, parts, group=mesh.get_group(), group_src=0)
    return DTensor.from_local(part, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def _wrap_method(owner: type, name: str, context: Callable[[], AbstractContextManager[object]]) -> Replacement:
    """Return a replacement that runs a method within a context."""
    original = vars(owner)[name]

    def wrapped(*args: Any) -> Any:
        with context():
            return original(*args)

    return Replacement(owner, name, wrapped)


def _call_unchecked(make: Callable[..., DTensor], *args: Any, **kwargs: Any) -> DTensor:
    """Make a DTensor without the checks and updates that exchange values between ranks."""
    checks = ("run_check", "update_uneven_dtensor_chunk_meta", "force_sync_tp_duplicated_param")
    return make(*args, **kwargs | dict.fromkeys(checks, False))


def _register_from_list(wrapper: MegatronFSDP, register: Callable[..., None], root: torch.nn.Module) -> None:
    """Register hooks, listing the parameters of the module only once.

    Megatron-FSDP 0.19.2 lists them again for each module, so its time grows with the square of the number of layers.
    """
    parameters = list(root.parameters())

    def list_parameters(recurse: bool = True) -> Iterator[torch.nn.Parameter | None]:
        return iter(parameters if recurse else root._parameters.values())

    with replace_attributes(Replacement(root, "parameters", list_parameters)):
        register(wrapper, root)
