"""Tell tensors of the CPU and of a GPU apart without a GPU.

The CPU runtime puts all tensors on the CPU. That hides code that mixes tensors of both devices, gives NCCL a tensor of
the CPU, or reads a tensor of the GPU by numpy. A `DeviceTracker` marks storages that were requested on the GPU, and
what is computed from them. Such tensors report `cuda:0` as their device; moving one to the other device copies it.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bridge.dist.cpu.redirect import CudaIsCpu
from bridge.dist.patch import Replacement, replace_attributes

_GPU = torch.device("cuda", 0)
_MAY_MIX = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::_index_put_impl_")


class DeviceTracker(TorchDispatchMode):
    """Knows on which device each tensor would be; `faults` lists what would fail there, with the place in the code."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.faults: list[str] = []
        # By identity; the storages are kept, so that no other one gets the same identity.
        self._marks: dict[int, tuple[torch.UntypedStorage, bool]] = {}

    def is_on_gpu(self, tensor: torch.Tensor) -> bool:
        """Return whether the tensor would be on the GPU."""
        mark = self._marks.get(tensor.untyped_storage()._cdata)
        return mark is not None and mark[1]

    def mark(self, values: Any, *, on_gpu: bool, again: bool = True) -> Any:
        """Mark the storages of all tensors in a structure and return it; leave marked ones unless ``again``."""
        for tensor in _list_tensors(values):
            storage = tensor.untyped_storage()
            if again or storage._cdata not in self._marks:
                self._marks[storage._cdata] = (storage, on_gpu)
        return values

    def report(self, fault: str) -> None:
        """Add a fault with the last place in Bridge or in a test."""
        places = [
            f"{frame.filename}:{frame.lineno}"
            for frame in traceback.extract_stack()
            if ("/bridge/" in frame.filename and "/cpu/" not in frame.filename)
            or ("/tests/" in frame.filename and frame.filename != __file__)
        ]
        self.faults.append(f"{fault} at {places[-1]}")

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            inputs = _list_tensors((args, kwargs))
            devices = {self.is_on_gpu(tensor) for tensor in inputs if tensor.dim()}
            name = func._schema.name
            if name.startswith("c10d::") and name != "c10d::barrier":
                if False in devices and not _is_within_object_collective():
                    self.report(f"{name} of a CPU tensor")
            elif len(devices) == 2 and name not in _MAY_MIX:
                self.report(f"{name} of tensors on both devices")
            result = func(*args, **(kwargs or {}))
            if name != "aten::copy_":
                self.mark(result, on_gpu=any(self.is_on_gpu(tensor) for tensor in inputs), again=False)
            return result


def _list_tensors(values: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(values) if _has_storage(one)]


def _has_storage(value: object) -> bool:
    """Return whether this is a tensor with memory, not a subclass that holds others, such as torch's ShardedTensor."""
    return type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_meta  # type: ignore[attr-defined]


def _is_within_object_collective() -> bool:
    """Return whether torch pickles objects, for which it takes the device of the backend."""
    return any(frame.name.endswith(("_object", "_object_list")) for frame in traceback.extract_stack())


@contextlib.contextmanager
def track_devices() -> Iterator[DeviceTracker]:
    """Track devices within the CPU runtime."""
    tracker = DeviceTracker()
    redirect = CudaIsCpu.__torch_function__

    def track(
        mode: CudaIsCpu, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}

        def run() -> Any:
            return redirect(mode, func, types, args, kwargs)

        if func is torch.device and _is_gpu(args[0] if args else next(iter(kwargs.values()))):
            return _GPU
        if func in (torch.Tensor.cuda, torch.Tensor.cpu, torch.Tensor.to):
            return _move(tracker, args[0], run, to=_find_target(func, args, kwargs))
        if args and _has_storage(args[0]) and tracker.is_on_gpu(args[0]):
            if func == torch.Tensor.device.__get__ and not _is_called_by_torch_distributed():
                return _GPU
            if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
                return True
            if func in (torch.Tensor.numpy, torch.Tensor.__array__):
                tracker.report("numpy reads a tensor of the GPU")
        result = run()
        if (device := kwargs.get("device")) is not None:
            tracker.mark(result, on_gpu=_is_gpu(device))
        return result

    with replace_attributes(Replacement(CudaIsCpu, "__torch_function__", track)), tracker:
        yield tracker


def _is_gpu(device: str | int | torch.device) -> bool:
    return isinstance(device, int) or torch.device(device).type == "cuda"


def _find_target(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the device that `cuda`, `cpu` or `to` moves a tensor to; None if `to` changes only its type."""
    if func is not torch.Tensor.to:
        return "cuda" if func is torch.Tensor.cuda else "cpu"
    target = args[1] if len(args) > 1 else kwargs.get("device")
    if isinstance(target, torch.Tensor):
        return target.device
    return target if isinstance(target, str | int | torch.device) else None


def _move(tracker: DeviceTracker, tensor: torch.Tensor, run: Callable[[], torch.Tensor], *, to: Any) -> torch.Tensor:
    moved = run()
    if to is None or not _has_storage(tensor):
        return moved
    on_gpu = _is_gpu(to)
    if on_gpu != tracker.is_on_gpu(tensor) and moved.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
        moved = moved.clone()
    tracker.mark(moved, on_gpu=on_gpu)
    return moved


def _is_called_by_torch_distributed() -> bool:
    """Return whether the caller chooses the backend by the device of a tensor: here it is gloo."""
    return sys._getframe(2).f_code.co_filename.endswith("distributed_c10d.py")
