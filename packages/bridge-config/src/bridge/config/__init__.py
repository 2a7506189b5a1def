"""Typed, lossless, safe model configurations as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge.config.errors import BridgeError, ConfigError, DocumentError, OmittedWarning, Problem, TargetError
from bridge.config.model import ModelConfig
from bridge.config.protocol import Serializable
from bridge.config.targets import register
from bridge.config.writethrough import WriteThrough

if TYPE_CHECKING:
    from bridge.config.document import Document, load_config

__all__ = [
    "BridgeError",
    "ConfigError",
    "Document",
    "DocumentError",
    "ModelConfig",
    "OmittedWarning",
    "Problem",
    "Serializable",
    "TargetError",
    "WriteThrough",
    "load_config",
    "register",
]


def __getattr__(name: str) -> object:
    # Reading documents needs more of the standard library than describing a model does.
    if name in ("Document", "load_config"):
        from bridge.config import document

        return getattr(document, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
