"""The redirection: a torch function that names the CUDA device computes on the one in its place."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.autograd.graph
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from bridge.dist.cpu import device as pretend
from bridge.dist.cpu.collectives import COLLECTIVES
from bridge.dist.errors import CpuRuntimeError


class MetaByDefault(DeviceContext):
    """`with torch.device("meta")`, but for literal data; what is asked for on CUDA is redirected below."""

    def __init__(self) -> None:
        super().__init__(pretend.META)

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.tensor:
            return func(*args, **kwargs or {})
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


class _TypeName(str):
    """`Tensor.type()` of a CPU tensor, equal to its CUDA spelling too: megatron-core's optimizers compare with that."""

    def __eq__(self, other: object) -> bool:
        here = f"torch.{pretend.in_place.type}.".replace("torch.cpu.", "torch.")
        return isinstance(other, str) and str(self) == other.replace("torch.cuda.", here)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _is_cuda(device: object) -> bool:
    """Whether this names a CUDA device, as a device, text or index."""
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return type(device) is int


def _device(*args: Any, **kwargs: Any) -> torch.device:
    named = args[0] if args else kwargs.get("type", kwargs.get("device"))
    return pretend.in_place if _is_cuda(named) else torch.device(*args, **kwargs)


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args and _is_cuda(args[0]):
        args = (pretend.in_place, *args[1:])
    return tensor.to(*args, **kwargs)


def _type(tensor: torch.Tensor, dtype: str | torch.dtype | None = None, **kwargs: Any) -> str | torch.Tensor:
    if dtype is None:
        return _TypeName(tensor.type())
    return tensor.type(dtype.replace("torch.cuda.", "torch.") if isinstance(dtype, str) else dtype, **kwargs)


def _cuda(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor.to(pretend.in_place)


def _return_tensor(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor


_REDIRECTED: Mapping[object, Callable[..., Any]] = {
    torch.device: _device,
    torch.Tensor.to: _to,
    torch.Tensor.type: _type,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.pin_memory: _return_tensor,
    **COLLECTIVES,
}


def _redirect_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    if _is_cuda(kwargs.get("device")):
        kwargs = {**kwargs, "device": pretend.in_place}
    if kwargs.get("pin_memory"):  # pinning asks for a CUDA driver
        kwargs = {**kwargs, "pin_memory": False}
    return kwargs


class CudaIsCpu(TorchFunctionMode):
    """Sends every torch function that names the CUDA device to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        redirected = _REDIRECTED.get(func, func)
        if not kwargs:
            return redirected(*args)
        return redirected(*args, **_redirect_kwargs(kwargs))


def make_redirected_backward() -> Callable[..., Any]:
    """The backward engine with the redirection on.

    torch switches a function mode off while one of its functions runs, and `Tensor.backward` is one: without this the
    backward of an `autograd.Function` (megatron-core's sequence and expert parallel mappings) would see no redirection.
    """
    try:
        engine = torch.autograd.graph._engine_run_backward
    except AttributeError:
        raise CpuRuntimeError(
            f"torch {torch.__version__} has no torch.autograd.graph._engine_run_backward, which the CPU runtime wraps "
            "to redirect the backward pass: use a version of torch that this bridge-dist was tested with"
        ) from None

    @functools.wraps(engine)
    def backward(*args: Any, **kwargs: Any) -> Any:
        with CudaIsCpu(), MetaByDefault() if pretend.in_place is pretend.META else contextlib.nullcontext():
            return engine(*args, **kwargs)

    return backward


def make_redirected_mesh_init() -> Callable[..., None]:
    """Return `DeviceMesh.__init__` that makes a mesh of CPUs where one of CUDA devices is asked for."""
    original = DeviceMesh.__init__

    @functools.wraps(original)
    def initialise(self: DeviceMesh, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    return initialise
