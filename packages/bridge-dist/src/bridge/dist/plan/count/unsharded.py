"""The peak of unsharded memory under wrappers that shard weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.transformer import MegatronModule
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.dist.plan.count.collectives import is_group
from bridge.dist.plan.count.memory import sharded_gradients, weight_tensors


class UnshardedMemory(TorchDispatchMode):
    """Tracks the memory of unsharded weights and gradients and of the buffers for gathering and reducing.

    ``peak`` is the peak in bytes. It is updated whenever a wrapper gathers, reduces or copies.
    """

    def __init__(self, stages: Sequence[MegatronModule], groups: Sequence[ProcessGroup]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._modules = [module for stage in stages for module in stage.modules() if module._parameters]
        self._groups = {str(group.group_name) for group in groups}
        held = [tensor for stage in stages for tensor in (*weight_tensors(stage), *sharded_gradients(stage))]
        self._held = {tensor.untyped_storage()._cdata for tensor in held}
        self._buffers: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "fsdp" and "record" not in func._schema.name:
            # `fsdp::record_grad_output_stream` (torch 2.15) moves no data.
            self._record_buffers(list(_flatten_tensors((args, *(kwargs or {}).values()))))
        elif func.namespace == "c10d" and any(_is_in_groups(argument, self._groups) for argument in args):
            # The smaller tensor is part of the larger one, or a shard that is counted elsewhere.
            self._record_buffers([max(_flatten_tensors(args), key=lambda tensor: tensor.numel())])
        return func(*args, **kwargs or {})

    def _record_buffers(self, buffers: list[torch.Tensor]) -> None:
        # Weak references, because freeing the buffers must lower the sum.
        for buffer in buffers:
            reference = StorageWeakRef(buffer.untyped_storage())
            self._buffers[reference.cdata] = reference
        sizes: dict[int, int] = {}
        for cdata in list(self._buffers):
            storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(cdata)
            if storage is None:
                del self._buffers[cdata]
            else:
                sizes[storage._cdata] = storage.nbytes()
        for tensor in self._unsharded_tensors():
            behind = tensor.untyped_storage()
            sizes[behind._cdata] = behind.nbytes()
        self.peak = max(self.peak, sum(size for cdata, size in sizes.items() if cdata not in self._held))

    def _unsharded_tensors(self) -> Iterator[torch.Tensor]:
        for module in self._modules:
            for parameter in module._parameters.values():
                if parameter is not None and not isinstance(parameter, DTensor):
                    gradient = (parameter.grad, getattr(parameter, "main_grad", None))
                    yield from (tensor for tensor in (parameter, *gradient) if tensor is not None)


def _flatten_tensors(argument: object) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from _flatten_tensors(item)


def _is_in_groups(argument: Any, groups: set[str]) -> bool:
    return is_group(argument) and ProcessGroup.unbox(argument).group_name in groups
