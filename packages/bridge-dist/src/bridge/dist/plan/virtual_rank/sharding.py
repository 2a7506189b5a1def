"""Megatron-FSDP and torch FSDP2 where tensors have no memory: what stops them there, and what they make whole."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial, partialmethod
from typing import Any

import torch
from megatron.core.distributed import FullyShardedDataParallel
from megatron.core.distributed.fsdp.src.megatron_fsdp import megatron_fsdp, param_and_grad_buffer
from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import MegatronFSDP
from megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer import ParamAndGradBuffer, ParameterGroup
from megatron.core.transformer import MegatronModule
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.dist.engine import meta
from bridge.dist.engine.release import clear_sharding_caches, release_sharded_models
from bridge.dist.patch import Replacement, replaced

_META = torch.device("meta")


@contextlib.contextmanager
def sharding_on_meta() -> Iterator[None]:
    """While Megatron-FSDP and torch FSDP2 wrap and run stages on the meta device, among groups that send nothing.

    Both compute nothing from values that a plan would miss; `_replacements` lists what stops them all the same.
    """
    with replaced(*_replacements()):
        try:
            yield
        finally:
            # Both would keep the process groups of a plan for the next one, see `destroy_process_groups`.
            release_sharded_models()
            clear_sharding_caches()


def _replacements() -> list[Replacement]:
    """What is replaced, seen in megatron-core 0.19.2 and torch 2.15; a test tells when one is no longer needed."""
    from torch.distributed.fsdp._fully_shard import _fully_shard
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    # A function of the same name hides the module.
    finalize_model_grads = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    members = cache(lambda parent: frozenset(parent.modules()))
    return [
        # There are no values to initialise.
        Replacement(meta, "initialised_by_wrapper", lambda *_: contextlib.nullcontext()),
        Replacement(meta, "initialise_shards", _nothing),
        # Megatron-FSDP reads back the numbers of ranks that it arranges.
        _around(FullyShardedDataParallel, "_init_dist_index", lambda: torch.device("cpu")),
        # It insists on parameters that are off the meta device once they have their buffers.
        _around(
            ParamAndGradBuffer,
            "_init_each_parameter_group_buffers",
            lambda: replaced(Replacement(torch.Tensor, "is_meta", False)),
        ),
        # What its ranks tell each other, of which nothing arrives: states of random generators, and for checkpoints
        # where each rank's part of a parameter begins.
        Replacement(FullyShardedDataParallel, "sync_rng_states_across_tp_group", _nothing),
        Replacement(
            param_and_grad_buffer, "make_fsdp_dtensor", partial(_unchecked, param_and_grad_buffer.make_fsdp_dtensor)
        ),
        # It looks through every module for each; of many layers that takes most of the time of a plan.
        *(
            Replacement(module, "is_submodule", lambda child, parent: child is not parent and child in members(parent))
            for module in (megatron_fsdp, param_and_grad_buffer)
        ),
        Replacement(MegatronFSDP, "_register_fsdp_hooks", partialmethod(_of_listed, MegatronFSDP._register_fsdp_hooks)),
        # FSDP2 takes a device for its buffers from the mesh, and the streams of that device from a module of its name.
        Replacement(_fully_shard, "_get_device_from_mesh", lambda mesh: _META),
        Replacement(torch, "meta", torch.cuda),
        # It refuses to run on the meta device.
        Replacement(FSDPParamGroup, "_validate_no_meta_params", _nothing),
        # There DTensor cuts, for as many ranks as there are, but does not send.
        Replacement(finalize_model_grads, "_reshard_if_dtensor", _scattered),
    ]


def _nothing(*_: object) -> None:
    pass


def _scattered(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Give each rank its part of a gradient, from the first."""
    if not isinstance(like, DTensor):
        return like
    part, mesh = torch.empty_like(like.to_local()), like.device_mesh
    parts = [part] * mesh.size() if mesh.get_local_rank() == 0 else None
    torch.distributed.scatter(part, parts, group=mesh.get_group(), group_src=0)
    return DTensor.from_local(part, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def _around(owner: type, name: str, context: Callable[[], AbstractContextManager[object]]) -> Replacement:
    """A method within a context."""
    original = vars(owner)[name]

    def called(*args: Any) -> Any:
        with context():
            return original(*args)

    return Replacement(owner, name, called)


def _unchecked(make: Callable[..., DTensor], *args: Any, **kwargs: Any) -> DTensor:
    checks = ("run_check", "update_uneven_dtensor_chunk_meta", "force_sync_tp_duplicated_param")
    return make(*args, **kwargs | dict.fromkeys(checks, False))


def _of_listed(wrapper: MegatronFSDP, register: Callable[..., None], root: torch.nn.Module) -> None:
    """Register hooks of a module whose parameters are listed once."""
    parameters = list(root.parameters())

    def listed(recurse: bool = True) -> Iterator[torch.nn.Parameter | None]:
        return iter(parameters if recurse else root._parameters.values())

    with replaced(Replacement(root, "parameters", listed)):
        register(wrapper, root)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor that is split over ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _groups_of(stage: FullyShardedDataParallel) -> list[ParameterGroup]:
    buffer: Any = stage.param_and_grad_buffer
    groups: list[ParameterGroup] = buffer.parameter_groups
    return groups


def weights(stage: MegatronModule) -> Iterator[torch.Tensor]:
    """Yield what holds the weights of a stage between steps."""
    if isinstance(stage, FullyShardedDataParallel):
        # Its parameters may be those of the optimizer, in full precision, which Megatron-FSDP makes itself.
        for group in _groups_of(stage):
            if group.model_weight_buffer is not None:
                yield group.model_weight_buffer.data
    else:
        yield from map(local, stage.parameters())


def sharded_gradients(stage: MegatronModule) -> Iterator[torch.Tensor]:
    """Yield what holds the gradients of a stage that an FSDP wraps, at the end of a step."""
    if isinstance(stage, FullyShardedDataParallel):
        for group in _groups_of(stage):
            if group.main_grad_buffer is not None:
                yield group.main_grad_buffer.data
    for parameter in stage.parameters():
        if parameter.grad is not None:
            yield local(parameter.grad)


def start_gathering(stages: Sequence[MegatronModule]) -> None:
    """Gather what the next step needs first, if that is done at the end of a step, by Megatron's optimizer."""
    for stage in stages:
        if isinstance(stage, FullyShardedDataParallel):
            wrapper: Any = stage
            wrapper.start_param_sync()


class WholeMemory(TorchDispatchMode):
    """Follows how much memory there is for whole weights and gradients, and for what is gathered and reduced.

    ``peak`` is the most at a time, in bytes. What there is, is seen whenever a wrapper gathers, reduces or copies.
    """

    def __init__(self, stages: Sequence[MegatronModule], groups: Sequence[ProcessGroup]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._modules = [module for stage in stages for module in stage.modules() if module._parameters]
        self._groups = {str(group.group_name) for group in groups}
        held = [tensor for stage in stages for tensor in (*weights(stage), *sharded_gradients(stage))]
        self._held = {tensor.untyped_storage()._cdata for tensor in held}
        self._buffers: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "fsdp" and "record" not in func._schema.name:  # which records what becomes a gradient
            self._see(list(_tensors((args, *(kwargs or {}).values()))))
        elif func.namespace == "c10d" and any(_is_of(argument, self._groups) for argument in args):
            # The smaller tensor is a part of it, or what is held.
            self._see([max(_tensors(args), key=lambda tensor: tensor.numel())])
        return func(*args, **kwargs or {})

    def _see(self, buffers: list[torch.Tensor]) -> None:
        for buffer in buffers:
            reference = StorageWeakRef(buffer.untyped_storage())
            self._buffers[reference.cdata] = reference
        there: dict[int, int] = {}
        for cdata in list(self._buffers):
            storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(cdata)
            if storage is None:
                del self._buffers[cdata]
            else:
                there[storage._cdata] = storage.nbytes()
        for tensor in self._whole():
            piece = tensor.untyped_storage()
            there[piece._cdata] = piece.nbytes()
        self.peak = max(self.peak, sum(size for cdata, size in there.items() if cdata not in self._held))

    def _whole(self) -> Iterator[torch.Tensor]:
        for module in self._modules:
            for parameter in module._parameters.values():
                if parameter is not None and not isinstance(parameter, DTensor):
                    gradient = (parameter.grad, getattr(parameter, "main_grad", None))
                    yield from (tensor for tensor in (parameter, *gradient) if tensor is not None)


def _tensors(argument: object) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from _tensors(item)


def _is_of(argument: Any, groups: set[str]) -> bool:
    return is_group(argument) and ProcessGroup.unbox(argument).group_name in groups


def is_group(argument: Any) -> bool:
    """Whether this argument of one of torch's operations is a process group."""
    return isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())
