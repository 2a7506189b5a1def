"""Importing megatron-core in the processes of the command line: without noise and, on a CPU, without torch's compiler.

Importing this module imports no torch.
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

_DYNAMO = "torch._dynamo"


def import_megatron(*, with_compiler: bool) -> None:
    """Import megatron-core, and keep what it says about missing CUDA libraries off the terminal.

    Those that are there count as missing where no GPU is visible.

    Args:
        with_compiler: False for a process that computes on the CPU only, where the CPU runtime compiles nothing:
            ``torch.compile`` then returns functions as they are for the rest of the process. megatron-core 0.19.2
            decorates functions with it as it is imported, which imports torch's compiler and doubles the time of the
            import.
    """
    _silence_imports()
    collects = gc.isenabled()
    gc.disable()  # there is nothing to free, and looking for it takes a sixth of the time
    try:
        if not with_compiler:
            _leave_out_compiler()
        hide_without_gpu()
        importlib.import_module("megatron.core")
        atexit.register(gc.unfreeze)  # what is frozen as Python ends counts as leaked
        gc.freeze()  # modules stay: later collections need not look at them, nor copy their pages in forked ranks
    finally:
        if collects:
            gc.enable()


def _silence_imports() -> None:
    """Also silences what ModelOpt says of itself, and torch while it reads a checkpoint."""
    warnings.filterwarnings("ignore", module=r"(megatron|modelopt|torch\.distributed\.checkpoint)\.")
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # of files that are compiled for the first time
    # megatron-core 0.19.2's distributed optimizer, where it sets gradients to zero, asks shards that are no leaves for
    # theirs: it alone sets them. Under the CPU runtime the warning names the runtime's file.
    warnings.filterwarnings(
        "ignore", "The .grad attribute of a Tensor that is not a leaf", module=r"bridge\.dist\.cpu\.redirect$"
    )
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _leave_out_compiler() -> None:
    import torch  # takes a second, and the command line imports this module before it knows whether it needs torch

    if _DYNAMO not in sys.modules:
        torch.compile = _return_unchanged  # type: ignore[assignment]
        torch.compiler.disable = _return_unchanged  # type: ignore[assignment]
        torch._dynamo = _UnloadedDynamo.make()


def is_compiler_left_out() -> bool:
    """Whether megatron-core was imported without the compiler, and nothing has loaded the compiler since."""
    return isinstance(sys.modules.get(_DYNAMO), _UnloadedDynamo)


class _UnloadedDynamo(ModuleType):
    """``torch._dynamo`` without its contents, which are loaded when something asks for more than is here.

    torch (2.6 to 2.15) imports the compiler in many places (an optimizer's step, DTensor, device meshes, activation
    checkpoints, dispatch modes) only to keep it out of a function. Here are the names that those places use.
    """

    @classmethod
    def make(cls) -> _UnloadedDynamo:
        spec = importlib.util.find_spec(_DYNAMO)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[_DYNAMO] = module
        importlib.import_module(f"{_DYNAMO}.config")  # many read it, and it imports nothing of the rest
        module.__class__ = cls
        vars(module).update(_NAMES_TO_KEEP_OUT)
        del module.__path__  # looked up for other submodules: they come with the rest
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
