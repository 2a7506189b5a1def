"""The models that Bridge builds from a config.json, in one process."""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from bridge.config import ModelConfig
from bridge.models.huggingface import from_hf


def build_bridge_model(config: dict[str, Any], pg_collection: ProcessGroupCollection) -> Any:
    """Return the model with initial weights."""
    read: Any = ModelConfig.from_dict(from_hf(config).data)
    read.transformer.use_cpu_initialization = True
    read.finalize()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return read.get_builder_cls()(read).build_model(pg_collection)
