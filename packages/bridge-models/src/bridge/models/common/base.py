"""The names of Megatron Bridge's `models.common.base`, re-exported from bridge.config and bridge.builders."""

from bridge.builders import BuildConfigT, ModelBuilder, ModelT, compose_hooks
from bridge.config import ModelConfig, Serializable

__all__ = ["BuildConfigT", "ModelBuilder", "ModelConfig", "ModelT", "Serializable", "compose_hooks"]
