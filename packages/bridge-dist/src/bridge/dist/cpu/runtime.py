"""Installing the CPU runtime and removing it: every name that is replaced, and by what."""

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
from bridge.dist.cpu.device import META, STREAM, TORCH_CUDA, make_constant, place_on
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
        undo.enter_context(replace_attributes(*_list_replacements()))
        undo.enter_context(_silence_generator_warning())
        if not is_compiler_left_out():
            # Compiled functions run as they are written: the compiler would ask the pretend device for its properties.
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.enter_context(_enter_mode(CudaIsCpu()))
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
    with cpu_runtime(), MetaByDefault(), place_on(META):
        yield


def _list_replacements() -> list[Replacement]:
    """Every name that is replaced, and by what."""
    # Imported before anything is replaced, and here: importing this module must stay cheap.
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
        # torch 2.11 asks here, at the end of a backward pass under FSDP2, and 2.15 in torch.cuda.
        Replacement(torch.accelerator, "current_stream", make_constant(STREAM)),
        *(Replacement(torch.cuda.nvtx, name, make_constant(0)) for name in ("range_push", "range_pop")),
        # The source of every figure about memory: without figures all are zero.
        Replacement(torch.cuda.memory, "memory_stats_as_nested_dict", lambda *_, **__: {}),
        # Not in `redirect._REDIRECTED`: torch refuses a stream that is not its own before it asks the mode.
        Replacement(torch.Tensor, "record_stream", make_constant(None)),
        Replacement(DeviceMesh, "__init__", make_redirected_mesh_init()),
        *(Replacement(module, "_engine_run_backward", backward) for module in (torch.autograd.graph, torch.autograd)),
        *(Replacement(module, "_coalescing_manager", skip_coalescing) for module in (torch.distributed, *buffers)),
        *(Replacement(module, "maybe_move_tensor_to_cpu", _maybe_move_tensor_to_cpu) for module in moe),
        *replace_group_methods(),
    ]


@contextlib.contextmanager
def _silence_generator_warning() -> Iterator[None]:
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
def _enter_mode(mode: TorchFunctionMode) -> Iterator[None]:
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


def _maybe_move_tensor_to_cpu(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
    """megatron-core 0.19.2 converts to numpy only what it moved; a tensor that is on the CPU already stays a tensor."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
