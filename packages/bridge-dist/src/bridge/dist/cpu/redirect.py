"""Redirection of torch functions from the CUDA device to its backing device."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.autograd.graph
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from bridge.dist.cpu import device as emulated
from bridge.dist.cpu.collectives import COLLECTIVES
from bridge.dist.errors import CpuRuntimeError


class MetaByDefault(DeviceContext):
    """Like `with torch.device("meta")`, except for literal data. CUDA requests are redirected below."""

    def __init__(self) -> None:
        super().__init__(emulated.META)

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.tensor:
            return func(*args, **kwargs or {})
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


class _TypeName(str):
    """The result of `Tensor.type()`; also equals its CUDA name, which megatron-core's optimizers compare with."""

    def __eq__(self, other: object) -> bool:
        here = f"torch.{emulated.backing_device.type}.".replace("torch.cpu.", "torch.")
        return isinstance(other, str) and str(self) == other.replace("torch.cuda.", here)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _is_cuda(device: object) -> bool:
    """Return whether this is a CUDA device, given as a device, a string or an index."""
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return type(device) is int  # torch takes an index as a CUDA device; a bool is not one


def _make_device(*args: Any, **kwargs: Any) -> torch.device:
    named = args[0] if args else kwargs.get("type", kwargs.get("device"))
    return emulated.backing_device if _is_cuda(named) else torch.device(*args, **kwargs)


def _move_to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args and _is_cuda(args[0]):
        args = (emulated.backing_device, *args[1:])
    return tensor.to(*args, **kwargs)


def _convert_type(tensor: torch.Tensor, dtype: str | torch.dtype | None = None, **kwargs: Any) -> str | torch.Tensor:
    if dtype is None:
        return _TypeName(tensor.type())
    return tensor.type(dtype.replace("torch.cuda.", "torch.") if isinstance(dtype, str) else dtype, **kwargs)


def _move_to_cuda(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor.to(emulated.backing_device)


def _return_tensor(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor


_REDIRECTED: Mapping[object, Callable[..., Any]] = {
    torch.device: _make_device,
    torch.Tensor.to: _move_to,
    torch.Tensor.type: _convert_type,
    torch.Tensor.cuda: _move_to_cuda,
    torch.Tensor.pin_memory: _return_tensor,
    **COLLECTIVES,
}


def _redirect_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    if _is_cuda(kwargs.get("device")):
        kwargs = {**kwargs, "device": emulated.backing_device}
    if kwargs.get("pin_memory"):  # pinning needs a CUDA driver
        kwargs = {**kwargs, "pin_memory": False}
    return kwargs


class CudaIsCpu(TorchFunctionMode):
    """Redirects torch functions that use the CUDA device to its backing device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        redirected = _REDIRECTED.get(func, func)
        if not kwargs:
            return redirected(*args)
        return redirected(*args, **_redirect_kwargs(kwargs))


def make_redirected_backward() -> Callable[..., Any]:
    """Return the backward engine with the redirection enabled.

    torch disables a function mode while one of its functions runs, and `Tensor.backward` is one. Without this the
    backward of an `autograd.Function` (megatron-core's sequence and expert parallel mappings) would not be redirected.
    """
    try:
        engine = torch.autograd.graph._engine_run_backward
    except AttributeError:
        raise CpuRuntimeError(
            f"torch {torch.__version__} has no torch.autograd.graph._engine_run_backward, which the CPU runtime wraps "
            "to redirect the backward pass: install a torch version that bridge-dist supports"
        ) from None

    @functools.wraps(engine)
    def backward(*args: Any, **kwargs: Any) -> Any:
        with CudaIsCpu(), MetaByDefault() if emulated.backing_device is emulated.META else contextlib.nullcontext():
            return engine(*args, **kwargs)

    return backward


def make_redirected_mesh_init() -> Callable[..., None]:
    """Return a `DeviceMesh.__init__` that makes a CPU mesh when a CUDA mesh is requested."""
    original = DeviceMesh.__init__

    @functools.wraps(original)
    def initialise(self: DeviceMesh, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    return initialise
