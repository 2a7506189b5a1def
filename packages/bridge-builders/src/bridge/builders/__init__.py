"""The builder interface, and hooks on the stages that a builder returns."""

from bridge.config.import_warnings import silence_imports

silence_imports()  # before megatron-core is imported

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
