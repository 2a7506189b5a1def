"""Libraries of CUDA kernels, which are hidden where no GPU is visible.

megatron-core 0.19.2 uses their layers, optimizers and kernels if it can import them, and all of these fail without a
GPU. The import itself may fail: without a driver, Transformer Engine with NCCL EP raises an OSError (its issue 3381),
and Megatron handles only ImportError. Importing this module does not import torch.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

_NAMES = (
    "transformer_engine",
    "transformer_engine_torch",
    "apex",
    "amp_C",
    "fused_weight_gradient_mlp_cuda",
    "scaled_masked_softmax_cuda",
    "scaled_softmax_cuda",
    "scaled_upper_triang_masked_softmax_cuda",
    "mamba_ssm",
    "causal_conv1d",
)

_hidden: set[str] = set()


def hide_without_gpu() -> list[str]:
    """Hide the libraries from `import` if no GPU is visible; return those that were already imported.

    A library that has a stand-in is neither.
    """
    import torch  # inside: the command line imports this module and starts without torch

    if torch.cuda.is_available():
        return []
    names = [name for name in _NAMES if not has_stand_in(name)]
    for name in names:
        if name not in sys.modules and importlib.util.find_spec(name) is not None:
            sys.modules[name] = None  # type: ignore[assignment]  # makes Python raise ModuleNotFoundError
            _hidden.add(name)
    return [name for name in names if sys.modules.get(name) is not None]


def explain_missing(*names: str) -> str:
    """Explain why libraries that are needed together cannot be used; the text follows their names."""
    are, both = ("is", "") if len(names) == 1 else ("are", "both ")
    return f"{are} installed but no GPU is visible" if _hidden.issuperset(names) else f"{are} not {both}installed"


class _StandIn(NamedTuple):
    """A finder that answers imports of a library with a package in a folder."""

    name: str
    folder: Path

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the package for the library; Python finds its modules in the folder."""
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(
            fullname, self.folder / "__init__.py", submodule_search_locations=[str(self.folder)]
        )


def replace_library(name: str, folder: Path) -> None:
    """Answer imports of a library, which nothing has imported yet, with a package in a folder."""
    if not has_stand_in(name):
        finder: MetaPathFinder = _StandIn(name, folder)  # type: ignore[assignment]  # it has the one method that counts
        sys.meta_path.insert(0, finder)
        sys.modules.pop(name, None)  # hidden before


def has_stand_in(name: str) -> bool:
    """Return whether imports of a library are answered with another package."""
    return any(isinstance(finder, _StandIn) and finder.name == name for finder in sys.meta_path)
