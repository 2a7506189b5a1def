"""Install and uninstall the CPU runtime: the list of replaced attributes and their replacements."""

import contextlib
import importlib
import logging
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.autograd.graph
import torch.cuda.memory
import torch.cuda.nvtx
import torch.cuda.random
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from bridge.dist.cpu.collectives import replace_group_methods, skip_coalescing
from bridge.dist.cpu.device import META, STREAM, TORCH_CUDA, back_with, make_constant
from bridge.dist.cpu.redirect import CudaIsCpu, MetaByDefault, make_redirected_backward, make_redirected_mesh_init
from bridge.dist.errors import CpuRuntimeError
from bridge.dist.internals import MEGATRON_MESSAGE
from bridge.dist.patch import Replacement, replace_attributes
from bridge.dist.process import gpu_libraries
from bridge.dist.process.imports import is_compiler_left_out


class _Installation(NamedTuple):
    undo: contextlib.ExitStack
    thread: int


_installation: _Installation | None = None


def is_installed() -> bool:
    """Return whether the CPU runtime is installed."""
    return _installation is not None


def install() -> None:
    """Emulate `cuda:0` on the CPU until `uninstall`. Do nothing if the runtime is already installed.

    Raises:
        CpuRuntimeError: A real GPU is visible, a library that needs one was imported, or this version of torch lacks
            a name that has to be replaced.
    """
    global _installation
    if is_installed():
        return
    if torch.cuda.is_available():
        raise CpuRuntimeError(
            "the CPU runtime cannot be installed while a GPU is visible: remove cpu_runtime() to compute on the GPU, "
            "or start the process with CUDA_VISIBLE_DEVICES='' to compute on the CPU"
        )
    if bound := gpu_libraries.hide_without_gpu():
        raise CpuRuntimeError(
            f"{', '.join(bound)} cannot compute on the CPU, but is already imported and Megatron would use it: "
            "install the CPU runtime before importing megatron-core"
        )
    with contextlib.ExitStack() as undo:
        undo.enter_context(replace_attributes(*_list_replacements()))
        undo.enter_context(_silence_generator_warning())
        if not is_compiler_left_out():
            # Run compiled functions eagerly: the compiler would query the properties of the emulated device.
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.enter_context(_enter_mode(CudaIsCpu()))
        _installation = _Installation(undo.pop_all(), threading.get_ident())


def uninstall() -> None:
    """Restore every replaced attribute. Do nothing if the runtime is not installed.

    Raises:
        CpuRuntimeError: Another thread installed it; only that one can uninstall it.
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
    """Install the CPU runtime until the context is left. Do nothing if it is already installed.

    Raises:
        CpuRuntimeError: See `install`.
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
    """Back `cuda:0` by the meta device inside the CPU runtime, and make meta tensors by default.

    Tensors of literal data (`torch.tensor`) stay on the CPU, because Megatron reads them back.

    Raises:
        CpuRuntimeError: See `install`.
    """
    with cpu_runtime(), MetaByDefault(), back_with(META):
        yield


def _list_replacements() -> list[Replacement]:
    """List every replaced attribute with its replacement."""
    # Imported here to keep importing this module cheap, and before anything is replaced.
    moe = [
        importlib.import_module(f"megatron.core.transformer.moe.{name}") for name in ("moe_utils", "token_dispatcher")
    ]
    buffers = [
        importlib.import_module(f"megatron.core.distributed.{name}param_and_grad_buffer")
        for name in ("", "fsdp.src.megatron_fsdp.")
    ]
    backward = make_redirected_backward()
    return [
        *(Replacement(torch.cuda, name, value) for name, value in TORCH_CUDA.items()),
        *(Replacement(torch.cuda.random, name, TORCH_CUDA[name]) for name in ("current_device", "device_count")),
        # Called at the end of a backward pass under FSDP2 by torch 2.11; torch 2.15 calls torch.cuda instead.
        Replacement(torch.accelerator, "current_stream", make_constant(STREAM)),
        *(Replacement(torch.cuda.nvtx, name, make_constant(0)) for name in ("range_push", "range_pop")),
        # The source of all memory statistics: an empty dictionary makes them zero.
        Replacement(torch.cuda.memory, "memory_stats_as_nested_dict", lambda *_, **__: {}),
        # Not in `redirect._REDIRECTED`: torch rejects a foreign stream before it calls the mode.
        Replacement(torch.Tensor, "record_stream", make_constant(None)),
        Replacement(DeviceMesh, "__init__", make_redirected_mesh_init()),
        *(Replacement(module, "_engine_run_backward", backward) for module in (torch.autograd.graph, torch.autograd)),
        *(Replacement(module, "_coalescing_manager", skip_coalescing) for module in (torch.distributed, *buffers)),
        *(Replacement(module, "maybe_move_tensor_to_cpu", _maybe_move_tensor_to_cpu) for module in moe),
        *replace_group_methods(),
    ]


@contextlib.contextmanager
def _silence_generator_warning() -> Iterator[None]:
    """Silence megatron-core's warning that drawing on the GPU advanced the CPU generator: here they are the same."""
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(_is_not_generator_warning)
    try:
        yield
    finally:
        logger.removeFilter(_is_not_generator_warning)


def _is_not_generator_warning(record: logging.LogRecord) -> bool:
    return record.msg != MEGATRON_MESSAGE


@contextlib.contextmanager
def _enter_mode(mode: TorchFunctionMode) -> Iterator[None]:
    """Enter a mode and remove it on exit from any position: torch may have pushed modes of its own above it."""
    mode.__enter__()
    try:
        yield
    finally:
        above = []
        while (top := torch.overrides._pop_mode()) is not mode:
            above.append(top)
        for other in reversed(above):
            torch.overrides._push_mode(other)


def _maybe_move_tensor_to_cpu(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
    """Convert CPU tensors to numpy too; megatron-core 0.19.2 converts only tensors that it moved from the GPU."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
