"""Builders that restore a model that NVIDIA ModelOpt changed, for example by quantisation or sparsity.

It imports bridge.models.backend, bridge.models.common and the packages below. Only `state` and `attention` import
ModelOpt, and they are imported only when there is a state to restore.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bridge.models.modelopt.builder import ModelOptBuilder

__all__ = ["ModelOptBuilder"]


def __getattr__(name: str) -> object:
    if name == "ModelOptBuilder":
        from bridge.models.modelopt.builder import ModelOptBuilder  # imports megatron-core, which rules do not need

        return ModelOptBuilder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
