"""From a configuration to a model: the builder contract and the hooks around it."""

from bridge.config.noise import silence

silence()  # before megatron-core is imported

# ruff: noqa: E402
from bridge.builders.builder import BuildConfigT, MixedPrecisionWrapper, ModelBuilder, ModelT, accepted_config
from bridge.builders.embeds import EmbedsTransformer
from bridge.builders.errors import BuilderError, HookError
from bridge.builders.hooks import Hook, compose_hooks

__all__ = [
    "BuildConfigT",
    "BuilderError",
    "EmbedsTransformer",
    "Hook",
    "HookError",
    "MixedPrecisionWrapper",
    "ModelBuilder",
    "ModelT",
    "accepted_config",
    "compose_hooks",
]
