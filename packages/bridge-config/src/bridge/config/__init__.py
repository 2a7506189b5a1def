"""Typed, lossless, safe model configurations as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge.config.errors import BridgeError, ConfigError, DocumentError, OmittedWarning, Problem, TargetError
from bridge.config.model import ModelConfig
from bridge.config.protocol import Serializable
from bridge.config.writethrough import WriteThrough

if TYPE_CHECKING:
    from bridge.config.compare import Difference
    from bridge.config.documents.document import Document, load_config
    from bridge.config.schema.registry import register
    from bridge.config.schema.versions import Changed, Moved, Removed, Schema

__all__ = [
    "BridgeError",
    "Changed",
    "ConfigError",
    "Difference",
    "Document",
    "DocumentError",
    "ModelConfig",
    "Moved",
    "OmittedWarning",
    "Problem",
    "Removed",
    "Schema",
    "Serializable",
    "TargetError",
    "WriteThrough",
    "load_config",
    "register",
]

# Loaded on first use: reading, comparing and migrating documents import more than defining a model config needs.
_LAZY = {
    "Changed": "schema.versions",
    "Difference": "compare",
    "Document": "documents.document",
    "Moved": "schema.versions",
    "Removed": "schema.versions",
    "Schema": "schema.versions",
    "load_config": "documents.document",
    "register": "schema.registry",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"bridge.config.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
