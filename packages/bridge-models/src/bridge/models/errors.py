"""The errors of bridge-models."""

from __future__ import annotations

from bridge.config import BridgeError


class ModelError(BridgeError):
    """Base of every error that bridge-models raises."""


class ModelConfigError(ModelError, ValueError):
    """A configuration does not describe a model that can be built. Says which field, and what to set."""


class UnsupportedError(ModelError, ValueError):
    """A configuration is sound, but the layers at hand cannot build it. Says what is missing, and what to set."""


class LayerSpecError(ModelError, TypeError):
    """A transformer layer spec is not a spec, or a function that should return one does not."""


class CheckpointError(ModelError, ValueError):
    """A model cannot be restored from a checkpoint. Says what is wrong with it, and what to give or to set."""
