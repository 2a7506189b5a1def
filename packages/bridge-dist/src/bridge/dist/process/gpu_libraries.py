"""Libraries of CUDA kernels, which are hidden where no GPU is visible.

megatron-core 0.19.2 uses their layers, optimizers and kernels if it can import them, and all of these fail without a
GPU. The import itself may fail: without a driver, Transformer Engine with NCCL EP raises an OSError (its issue 3381),
and Megatron handles only ImportError. Importing this module does not import torch.
"""

from __future__ import annotations

import importlib.util
import sys

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
    """Hide the libraries from `import` if no GPU is visible; return those that were already imported."""
    import torch  # inside: the command line imports this module and starts without torch

    if torch.cuda.is_available():
        return []
    for name in _NAMES:
        if name not in sys.modules and importlib.util.find_spec(name) is not None:
            sys.modules[name] = None  # type: ignore[assignment]  # makes Python raise ModuleNotFoundError
            _hidden.add(name)
    return [name for name in _NAMES if sys.modules.get(name) is not None]


def explain_missing(*names: str) -> str:
    """Explain why libraries that are needed together cannot be used; the text follows their names."""
    are, both = ("is", "") if len(names) == 1 else ("are", "both ")
    return f"{are} installed but no GPU is visible" if _hidden.issuperset(names) else f"{are} not {both}installed"
