"""T5: its configuration, its layers and the builder of Megatron-Core's T5Model.

It imports bridge.models.backend, bridge.models.common and the packages below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bridge.models.t5.builder import T5ModelBuilder
    from bridge.models.t5.config import T5ModelConfig

__all__ = ["T5ModelBuilder", "T5ModelConfig"]

_HOMES = {"T5ModelBuilder": "builder", "T5ModelConfig": "config"}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        from importlib import import_module  # megatron-core, which rules do without, takes seconds to import

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
