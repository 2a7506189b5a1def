"""Models of transformers: convert their config.json to documents and back, and load and save their weights.

Each architecture has one table (``families``) of rows (``fields``) for its config.json and one for its weights
(``weights``), both read in both directions. ``convert`` and ``folder`` import no torch; ``transfer`` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge.models.huggingface.config_json import load_config_json
from bridge.models.huggingface.convert import Converted, from_hf, to_hf

if TYPE_CHECKING:
    from bridge.models.huggingface.transfer.load import load_weights
    from bridge.models.huggingface.transfer.save import save_weights

__all__ = ["Converted", "from_hf", "load_config_json", "load_weights", "save_weights", "to_hf"]

_HOMES = {"load_weights": "load", "save_weights": "save"}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        from importlib import import_module  # torch and megatron-core take seconds to import

        return getattr(import_module(f"{__name__}.transfer.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
