"""The public path of the reference API: the very objects of the packages below."""

from bridge.builders import BuildConfigT, ModelBuilder, ModelT, compose_hooks
from bridge.config import ModelConfig, Serializable

__all__ = ["BuildConfigT", "ModelBuilder", "ModelConfig", "ModelT", "Serializable", "compose_hooks"]
