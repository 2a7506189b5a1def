"""Import megatron-core quietly and, on a CPU, without torch's compiler.

Importing this module does not import torch.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

from bridge.dist.process.gpu_libraries import hide_without_gpu

ATTENTION_BACKEND_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
"""Where megatron-core 0.19.2 stores the attention backend of a model; it then refuses to construct one with another."""

_DYNAMO = "torch._dynamo"


def import_megatron(*, with_compiler: bool) -> None:
    """Import megatron-core without its warnings about missing CUDA libraries.

    Where no GPU is visible, installed CUDA libraries are hidden from it.

    Args:
        with_compiler: False for a process that computes on the CPU only, where the CPU runtime compiles nothing:
            ``torch.compile`` then returns functions unchanged for the rest of the process. megatron-core 0.19.2 uses
            it as a decorator at import time, which imports torch's compiler and doubles the import time.
    """
    _silence_imports()
    collects = gc.isenabled()
    gc.disable()  # imports leave nothing to free, and collecting takes a sixth of the time
    try:
        if not with_compiler:
            _leave_out_compiler()
        hide_without_gpu()
        importlib.import_module("megatron.core")
        atexit.register(gc.unfreeze)  # objects still frozen at exit are reported as leaks
        gc.freeze()  # modules stay: later collections skip them, and forked ranks do not copy their pages
    finally:
        if collects:
            gc.enable()


def _silence_imports() -> None:
    """Silence the warnings of megatron-core, of ModelOpt, and of torch reading a checkpoint."""
    warnings.filterwarnings("ignore", module=r"(megatron|modelopt|torch\.distributed\.checkpoint)\.")
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # raised when Python first compiles a file
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _leave_out_compiler() -> None:
    import torch  # takes a second, and the command line imports this module without needing torch

    if _DYNAMO not in sys.modules:
        torch.compile = _return_unchanged  # type: ignore[assignment]
        torch.compiler.disable = _return_unchanged  # type: ignore[assignment]
        torch._dynamo = _UnloadedDynamo.make()


def is_compiler_left_out() -> bool:
    """Return whether megatron-core was imported without the compiler and nothing has loaded it since."""
    return isinstance(sys.modules.get(_DYNAMO), _UnloadedDynamo)


class _UnloadedDynamo(ModuleType):
    """A lazy ``torch._dynamo``: it has the few names below and loads the module when another one is read.

    torch (2.6 to 2.15) imports the compiler in many places (an optimizer's step, DTensor, device meshes, activation
    checkpoints, dispatch modes) only to exclude a function from compilation. Those places use these names.
    """

    @classmethod
    def make(cls) -> _UnloadedDynamo:
        spec = importlib.util.find_spec(_DYNAMO)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[_DYNAMO] = module
        importlib.import_module(f"{_DYNAMO}.config")  # widely read, and cheap: it does not import the rest
        module.__class__ = cls
        vars(module).update(_NAMES_TO_KEEP_OUT)
        del module.__path__  # without it, importing another submodule loads the whole module
        assert isinstance(module, cls)
        return module

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if spec is None or spec.loader is None or (name.startswith("__") and name != "__path__"):
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__path__ = spec.submodule_search_locations or []
        for stand_in in _NAMES_TO_KEEP_OUT:
            delattr(self, stand_in)
        spec.loader.exec_module(self)
        return getattr(self, name)


def _return_unchanged(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Callable[..., Any]:
    return _return_unchanged if function is None else function


def _do_nothing(*_: object, **__: object) -> None:
    pass


_NAMES_TO_KEEP_OUT = {
    "disable": _return_unchanged,
    "disable_nested_graph_breaks": contextlib.nullcontext,
    "graph_break": _do_nothing,
    "trace_rules": SimpleNamespace(clear_lru_cache=_do_nothing),
}
