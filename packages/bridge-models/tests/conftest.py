import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from isolation import no_attention_backend_chosen  # noqa: F401
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch._C._distributed_c10d import HashStore

from bridge.models.gpt import GPTModelConfig
from bridge.models.t5 import T5ModelConfig

TransformerFactory = Callable[..., TransformerConfig]
GPTFactory = Callable[..., GPTModelConfig]
T5Factory = Callable[..., T5ModelConfig]

# Four different layers: grouped queries; no attention and a linear MLP; linear attention and no MLP; a standard layer.
BLOCKS = [
    {"attention": {"num_query_groups": 2}, "mlp": {"ffn_hidden_size": 48}},
    {"attention": {"no_op": True, "num_query_groups": None}, "mlp": {"ffn_hidden_size": 64}},
    {
        "attention": {"replace_with_linear": True, "num_query_groups": None},
        "mlp": {"no_op": True, "ffn_hidden_size": None},
    },
    {"attention": {"num_query_groups": 4}, "mlp": {"replace_with_linear": True, "ffn_hidden_size": None}},
]


@pytest.fixture(scope="module")
def pg_collection() -> Iterator[ProcessGroupCollection]:
    """Create the process groups of a world of one rank."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield ProcessGroupCollection.use_mpu_process_groups()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def make_transformer(cls: type[TransformerConfig] = TransformerConfig, **given: Any) -> TransformerConfig:
    small = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "use_cpu_initialization": True}
    if cls is HeterogeneousTransformerConfig:
        given.setdefault("heterogeneous_layers_config_encoded_json", json.dumps({"block_configs": BLOCKS}))
    return cls(**small | given)


@pytest.fixture(scope="session")
def transformer() -> TransformerFactory:
    """Return a function that makes small transformers: ``transformer(cls, num_layers=2, ...)``."""
    return make_transformer


@pytest.fixture(scope="session")
def gpt() -> GPTFactory:
    """Return a function that makes small GPTs: ``gpt(num_layers=2, outer={"vocab_size": 64})``."""

    def make(
        cls: type[TransformerConfig] = TransformerConfig, *, outer: dict[str, Any] | None = None, **given: Any
    ) -> GPTModelConfig:
        return GPTModelConfig(
            transformer=make_transformer(cls, **given), **{"vocab_size": 96, "seq_length": 16} | (outer or {})
        )

    return make


@pytest.fixture(scope="session")
def t5() -> T5Factory:
    """Return a function that makes small T5s: ``t5(num_layers=2, outer={"vocab_size": 64})``."""

    def make(
        cls: type[TransformerConfig] = TransformerConfig, *, outer: dict[str, Any] | None = None, **given: Any
    ) -> T5ModelConfig:
        inner = {"num_layers": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0} | given
        return T5ModelConfig(transformer=make_transformer(cls, **inner), **{"vocab_size": 96} | (outer or {}))

    return make
