"""Errors of bridge-builders."""

from __future__ import annotations

from bridge.config import BridgeError


class BuilderError(BridgeError):
    """Base class of all errors that bridge-builders raises."""


class HookError(BuilderError, TypeError):
    """A hook is not callable, or did not return a list of modules."""
