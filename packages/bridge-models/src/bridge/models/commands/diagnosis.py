"""The part of `bridge doctor` about the layers of models.

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from bridge.config.diagnosis import Finding
from bridge.dist.run.devices import can_use_gpus, count_gpus


def find_layers() -> Iterator[Finding]:
    """Yield which layers models are built from on this machine, and why."""
    has_gpu = count_gpus() > 0 and can_use_gpus()
    yield _describe("layers", "Transformer Engine", modules=["transformer_engine"], has_gpu=has_gpu)
    yield _describe(
        "Mamba layers", "mamba-ssm and causal-conv1d", modules=["mamba_ssm", "causal_conv1d"], has_gpu=has_gpu
    )


def _describe(name: str, library: str, *, modules: list[str], has_gpu: bool) -> Finding:
    are = "are" if len(modules) > 1 else "is"
    if not all(find_spec(module) for module in modules):
        reason = f"{library} {are} not installed" + ("" if has_gpu else ", and would need a GPU")
    elif not has_gpu:
        reason = f"{library} {are} installed, but no GPU is visible"
    else:
        return Finding(section="Layers", name=name, value=library, meaning="where a document does not choose others")
    return Finding(section="Layers", name=name, value="PyTorch", meaning=reason)
