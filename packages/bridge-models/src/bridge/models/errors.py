"""Errors of bridge-models."""

from __future__ import annotations

from bridge.config import BridgeError


class ModelError(BridgeError):
    """Base class of all errors that bridge-models raises."""


class ModelConfigError(ModelError, ValueError):
    """A configuration does not describe a model that can be built. The message names the field and what to set."""


class UnsupportedError(ModelError, ValueError):
    """The available layers do not support a valid configuration. The message says what is missing and what to do."""


class LayerSpecError(ModelError, TypeError):
    """A layer spec has the wrong type, or a function that must return one does not."""


class CheckpointError(ModelError, ValueError):
    """A model cannot be restored from a checkpoint. The message says why, and what to pass or set."""
