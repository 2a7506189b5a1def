"""The errors of bridge-builders."""

from __future__ import annotations

from bridge.config import BridgeError


class BuilderError(BridgeError):
    """Base of every error that bridge-builders raises."""


class HookError(BuilderError, TypeError):
    """A hook is not callable, or returned something that is not a list of modules."""
