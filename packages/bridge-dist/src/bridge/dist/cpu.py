"""Run megatron-core, and code written for it, on a machine without a GPU.

megatron-core 0.19.2 asks for a CUDA device in a few dozen places. While this runtime is installed there is one pretend
device, `cuda:0`, and it is the CPU: tensors asked for on CUDA are made in host memory, streams and events do nothing
because work on a CPU is in program order (collectives end before they return, to make it so), and the CUDA random
generator is the CPU's. `torch.cuda.is_available()` stays False, so that code which has a way for the CPU takes it. Use
the gloo backend for the process groups.

`_replacements` lists every name that is replaced; `_REDIRECTED` lists the torch functions that name a device elsewhere
than in the keyword `device`.

Not covered:

- Threads other than the one that called `install`: the redirection of torch functions is thread-local. Autograd runs
  the backward pass of CPU tensors in the calling thread, so it is covered.
- What exists only on a GPU: Transformer Engine, Triton kernels, CUDA graphs, memory pools, FP8.
- `torch.compile`: compiled functions run as they are written.
- Names that another module bound (`from torch.cuda import Stream`) before `install`, and those that it bound while
  the runtime was installed and keeps after `uninstall`.
- The insides of torch functions written in Python: torch switches the redirection off while one runs. The backward
  pass is one of them, and is covered.
"""

import contextlib
import functools
import importlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import torch
import torch.autograd.graph
import torch.cuda.memory
import torch.cuda.nvtx
import torch.cuda.random
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _CoalescingManager
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from bridge.dist import gpu_libraries
from bridge.dist.errors import DistError
from bridge.dist.imports import is_compiler_left_out
from bridge.dist.internals import MEGATRON_MESSAGE, TESTED_THROUGHOUT, TORCH
from bridge.dist.patch import Replacement, replaced

_CPU = torch.device("cpu")
_META = torch.device("meta")

_device_in_place: torch.device = _CPU
"""What `cuda:0` is at present: the CPU, or within `on_meta` the meta device."""


class CpuRuntimeError(DistError, RuntimeError):
    """The CPU runtime cannot be installed, or removed, here."""


class _Installation(NamedTuple):
    undo: contextlib.ExitStack
    thread: int


_installation: _Installation | None = None


def is_installed() -> bool:
    """Whether `cuda:0` is the CPU at present."""
    return _installation is not None


def install() -> None:
    """Make `cuda:0` the CPU until `uninstall`; does nothing where that is so already.

    Raises:
        CpuRuntimeError: there is a real GPU, or a library was imported that needs one, or this version of torch lacks
            a name that is replaced.
    """
    global _installation
    if is_installed():
        return
    if torch.cuda.is_available():
        raise CpuRuntimeError(
            "the CPU runtime does not hide a real GPU: leave it out to compute on that, "
            "or start the process with CUDA_VISIBLE_DEVICES='' to compute on the CPU"
        )
    if bound := gpu_libraries.hide_without_gpu():
        raise CpuRuntimeError(
            f"{', '.join(bound)} cannot compute on the CPU, and Megatron computes with what is imported: "
            "install the CPU runtime before megatron-core is imported"
        )
    with contextlib.ExitStack() as undo:
        undo.enter_context(replaced(*_replacements()))
        undo.enter_context(_without_generator_warning())
        if not is_compiler_left_out():
            # Compiled functions run as they are written: the compiler would ask the pretend device for its properties.
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.enter_context(_entered(_CudaIsCpu()))
        _installation = _Installation(undo.pop_all(), threading.get_ident())


def uninstall() -> None:
    """Put every name back; does nothing where the runtime is not installed.

    Raises:
        CpuRuntimeError: another thread installed it; only that one can remove it.
    """
    global _installation
    if _installation is None:
        return
    if _installation.thread != threading.get_ident():
        raise CpuRuntimeError("the CPU runtime must be uninstalled by the thread that installed it")
    _installation.undo.close()
    _installation = None


@contextlib.contextmanager
def cpu_runtime() -> Iterator[None]:
    """`install`, and on leaving `uninstall`; inside another installation it changes nothing.

    Raises:
        CpuRuntimeError: as `install`.
    """
    if is_installed():
        yield
        return
    install()
    try:
        yield
    finally:
        uninstall()


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Inside the CPU runtime: tensors asked for on CUDA, or nowhere, have a shape and no memory; values read are real.

    What is made of literal data (`torch.tensor`) stays on the CPU, where Megatron reads it back.

    Raises:
        CpuRuntimeError: as `install`.
    """
    global _device_in_place
    with cpu_runtime(), _MetaByDefault():
        _device_in_place = _META
        try:
            yield
        finally:
            _device_in_place = _CPU


class _MetaByDefault(DeviceContext):
    """`with torch.device("meta")`, but for literal data; what is asked for on CUDA is redirected below."""

    def __init__(self) -> None:
        super().__init__(_META)

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.tensor:
            return func(*args, **kwargs or {})
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


class _Stream:
    """A stream on which everything has already happened."""

    device = torch.device("cpu")
    device_index = 0
    device_type = 1  # torch's number for CUDA
    stream_id = 0
    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Event:
    """A moment in program order; `elapsed_time` is wall-clock milliseconds."""

    def __init__(self, *_: object, **__: object) -> None:
        self._recorded_at = time.perf_counter()

    def record(self, stream: object = None) -> None:
        self._recorded_at = time.perf_counter()

    def elapsed_time(self, end_event: Self) -> float:
        return (end_event._recorded_at - self._recorded_at) * 1e3

    def wait(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class _NoContext(contextlib.nullcontext[None]):
    """`torch.cuda.device` and `torch.cuda.stream`: there is one device and one stream."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()


class _TypeName(str):
    """`Tensor.type()` of a CPU tensor, equal to its CUDA spelling too: megatron-core's optimizers compare with that."""

    def __eq__(self, other: object) -> bool:
        here = f"torch.{_device_in_place.type}.".replace("torch.cpu.", "torch.")
        return isinstance(other, str) and str(self) == other.replace("torch.cuda.", here)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _always(value: object) -> Callable[..., Any]:
    def function(*_: object, **__: object) -> object:
        return value

    return function


_STREAM = _Stream()
_TORCH_CUDA: Mapping[str, object] = {
    # The generator of the device is the CPU's, so megatron-core's random state tracker works as it is.
    "_initialized": True,
    "_is_in_bad_fork": _always(False),
    "default_generators": (torch.default_generator,),
    # An integer: megatron-core formats it into `cuda:{...}`.
    "current_device": _always(0),
    "device_count": _always(1),
    "device": _NoContext,
    "set_device": _always(None),
    "get_device_capability": _always((0, 0)),
    "Stream": _Stream,
    "ExternalStream": _Stream,
    "Event": _Event,
    "stream": _NoContext,
    "set_stream": _always(None),
    "current_stream": _always(_STREAM),
    "default_stream": _always(_STREAM),
    "synchronize": _always(None),
    "is_current_stream_capturing": _always(False),
    "empty_cache": _always(None),
    "reset_peak_memory_stats": _always(None),
}


def _replacements() -> list[Replacement]:
    """Every name that is replaced, and by what."""
    # Imported before anything is replaced, and here: importing this module must stay cheap.
    moe = [
        importlib.import_module(f"megatron.core.transformer.moe.{name}") for name in ("moe_utils", "token_dispatcher")
    ]
    buffers = [
        importlib.import_module(f"megatron.core.distributed.{name}param_and_grad_buffer")
        for name in ("", "fsdp.src.megatron_fsdp.")
    ]
    backward = _redirected_backward()
    return [
        *(Replacement(torch.cuda, name, value) for name, value in _TORCH_CUDA.items()),
        *(Replacement(torch.cuda.random, name, _TORCH_CUDA[name]) for name in ("current_device", "device_count")),
        # torch 2.11 asks here, at the end of a backward pass under FSDP2, and 2.15 in torch.cuda.
        Replacement(torch.accelerator, "current_stream", _always(_STREAM)),
        *(Replacement(torch.cuda.nvtx, name, _always(0)) for name in ("range_push", "range_pop")),
        # The source of every figure about memory: without figures all are zero.
        Replacement(torch.cuda.memory, "memory_stats_as_nested_dict", lambda *_, **__: {}),
        # Not in `_REDIRECTED`: torch refuses a stream that is not its own before it asks the mode.
        Replacement(torch.Tensor, "record_stream", _always(None)),
        Replacement(DeviceMesh, "__init__", _redirected_mesh()),
        *(Replacement(module, "_engine_run_backward", backward) for module in (torch.autograd.graph, torch.autograd)),
        *(Replacement(module, "_coalescing_manager", _not_coalesced) for module in (torch.distributed, *buffers)),
        *(Replacement(module, "maybe_move_tensor_to_cpu", _maybe_move_tensor_to_cpu) for module in moe),
        *_methods_of_groups(),
    ]


def _methods_of_groups() -> Iterator[Replacement]:
    """What collectives call, for torch 2.6, where they do not ask function modes: `_REDIRECTED` would be ignored."""
    if TORCH < TESTED_THROUGHOUT:
        group = torch.distributed.ProcessGroup
        for name in _GROUP_METHODS:
            yield Replacement(group, name, _finished(getattr(group, name)))


@contextlib.contextmanager
def _without_generator_warning() -> Iterator[None]:
    """Without megatron-core's warning that drawing on the GPU moved the CPU's generator: here they are one."""
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(_is_not_generator_warning)
    try:
        yield
    finally:
        logger.removeFilter(_is_not_generator_warning)


def _is_not_generator_warning(record: logging.LogRecord) -> bool:
    return record.msg != MEGATRON_MESSAGE


@contextlib.contextmanager
def _entered(mode: TorchFunctionMode) -> Iterator[None]:
    """The mode on torch's stack; taken out from wherever it stands by then, as torch keeps its own modes there."""
    mode.__enter__()
    try:
        yield
    finally:
        above = []
        while (top := torch.overrides._pop_mode()) is not mode:
            above.append(top)
        for other in reversed(above):
            torch.overrides._push_mode(other)


def _is_cuda(device: object) -> bool:
    """Whether this names a CUDA device, as a device, text or index."""
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return type(device) is int


def _device(*args: Any, **kwargs: Any) -> torch.device:
    named = args[0] if args else kwargs.get("type", kwargs.get("device"))
    return _device_in_place if _is_cuda(named) else torch.device(*args, **kwargs)


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args and _is_cuda(args[0]):
        args = (_device_in_place, *args[1:])
    return tensor.to(*args, **kwargs)


def _type(tensor: torch.Tensor, dtype: str | torch.dtype | None = None, **kwargs: Any) -> str | torch.Tensor:
    if dtype is None:
        return _TypeName(tensor.type())
    return tensor.type(dtype.replace("torch.cuda.", "torch.") if isinstance(dtype, str) else dtype, **kwargs)


def _cuda(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor.to(_device_in_place)


def _same(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor


def _finished(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that has ended when it returns, asynchronous or not.

    A stream frees memory after the collectives that use it; on the CPU it is gone at once. Megatron-FSDP (megatron-core
    0.19.2) frees what it gathers ahead, and gloo's thread would write into it.
    """

    def finished(*args: Any, **kwargs: Any) -> Any:
        work = collective(*args, **kwargs)
        if type(work) is torch.distributed.Work:
            work.wait()
        return work

    return finished


def _all_gather(
    parts: list[torch.Tensor], part: torch.Tensor, group: torch.distributed.ProcessGroup | None = None, **kwargs: Any
) -> Any:
    """Gather parts of different sizes too, as expert-tensor parallelism does; gloo takes only equal ones."""
    if len({each.shape for each in parts}) == 1:
        return _finished(torch.distributed.all_gather)(parts, part, group, **kwargs)
    parts[torch.distributed.get_rank(group)].copy_(part)
    for rank, each in enumerate(parts):
        torch.distributed.broadcast(each, group=group, group_src=rank)
    return None


def _reduce_scatter(
    output: torch.Tensor,
    parts: list[torch.Tensor],
    op: Any = torch.distributed.ReduceOp.SUM,
    group: torch.distributed.ProcessGroup | None = None,
    **kwargs: Any,
) -> Any:
    """The same in the other direction."""
    if len({each.shape for each in parts}) == 1:
        return _finished(torch.distributed.reduce_scatter)(output, parts, op, group, **kwargs)
    whole = torch.cat(parts)
    torch.distributed.all_reduce(whole, op, group=group)
    output.copy_(whole.split([len(each) for each in parts])[torch.distributed.get_rank(group)])
    return None


@contextlib.contextmanager
def _not_coalesced(*_: object, **__: object) -> Iterator[_CoalescingManager]:
    """In place of torch's manager, which sends several tensors at once: here each goes by itself, and has arrived.

    gloo packs what is sent at once into one tensor of the first one's type (seen in torch 2.15), so that parameters of
    different precision come back wrong.
    """
    yield _CoalescingManager()


_GROUP_METHODS = (
    "_allgather_base",
    "_reduce_scatter_base",
    "allgather",
    "allreduce",
    "alltoall",
    "alltoall_base",
    "broadcast",
    "reduce",
    "reduce_scatter",
)

# By name: those that end in `_single` are what their older spellings call in newer versions of torch.
_COLLECTIVES = [
    getattr(torch.distributed, name)
    for name in (
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_single",
        "all_reduce",
        "all_to_all",
        "all_to_all_single",
        "broadcast",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_single",
        "reduce_scatter_tensor",
    )
    if hasattr(torch.distributed, name)
]

_REDIRECTED: Mapping[object, Callable[..., Any]] = {
    torch.device: _device,
    torch.Tensor.to: _to,
    torch.Tensor.type: _type,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.pin_memory: _same,
    **{collective: _finished(collective) for collective in _COLLECTIVES},
    torch.distributed.all_gather: _all_gather,
    torch.distributed.reduce_scatter: _reduce_scatter,
}


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    if _is_cuda(kwargs.get("device")):
        kwargs = {**kwargs, "device": _device_in_place}
    if kwargs.get("pin_memory"):  # pinning asks for a CUDA driver
        kwargs = {**kwargs, "pin_memory": False}
    return kwargs


class _CudaIsCpu(TorchFunctionMode):
    """Sends every torch function that names the CUDA device to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        redirected = _REDIRECTED.get(func, func)
        if not kwargs:
            return redirected(*args)
        return redirected(*args, **_on_cpu(kwargs))


def _redirected_backward() -> Callable[..., Any]:
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
        with _CudaIsCpu(), _MetaByDefault() if _device_in_place is _META else contextlib.nullcontext():
            return engine(*args, **kwargs)

    return backward


def _redirected_mesh() -> Callable[..., None]:
    original = DeviceMesh.__init__

    @functools.wraps(original)
    def initialise(self: DeviceMesh, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    return initialise


def _maybe_move_tensor_to_cpu(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
    """megatron-core 0.19.2 converts to numpy only what it moved; a tensor that is on the CPU already stays a tensor."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
