"""Process settings required by a configuration are applied, skipped without a GPU, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from bridge.config import Document, ModelConfig
from bridge.dist.engine.environment import disable_cuda_graphs, inspect_process, prepare_process
from bridge.dist.errors import TrainingError
from bridge.dist.job import BuildJob
from bridge.dist.train.step import TrainOptions
from bridge.dist.train.text import find_default_text
from bridge.dist.wrapper import Wrapper

GRAPHS = ("transformer.use_te_rng_tracker=true", "transformer.cuda_graph_impl=local")


def make_transformer(**changed: Any) -> TransformerConfig:
    """Assign fields after construction, since the constructor would require other fields and libraries."""
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    for name, value in changed.items():
        setattr(config, name, value)
    return config


def make_job(*overrides: str) -> BuildJob:
    training = TrainOptions(steps=1, text=find_default_text(), seq_length=16, global_batch_size=1)
    return BuildJob(document=Document.load("tiny", overrides).data, wrapper=Wrapper.DDP, training=training)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Record the streams that are set; torch has none without a GPU."""
    found: list[object] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "a stream of its own")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "the default stream")
    monkeypatch.setattr(torch.cuda, "set_stream", found.append)
    yield found
    torch.use_deterministic_algorithms(False)


def test_transformer_engine_graphs_get_a_side_stream(streams: list[object]) -> None:
    for implementation in ("transformer_engine", "local", "none"):
        prepare_process(make_transformer(cuda_graph_impl=implementation))
    assert streams == ["a stream of its own", "the default stream", "the default stream"]


@pytest.mark.usefixtures("streams")
def test_deterministic_algorithms_follow_the_latest_configuration() -> None:
    for deterministic in (True, False):
        prepare_process(make_transformer(deterministic_mode=deterministic))
        assert torch.are_deterministic_algorithms_enabled() is deterministic


def test_without_a_gpu_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    here = inspect_process()
    assert here.variables["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert (here.compute_capability, here.has_user_buffers, here.is_batch_invariant) == (None, False, False)


@pytest.mark.parametrize("implementation", ["local", "transformer_engine", "full_iteration"])
def test_without_a_gpu_there_are_no_cuda_graphs(implementation: str) -> None:
    config = make_transformer(cuda_graph_impl=implementation)
    disable_cuda_graphs(config)
    assert config.cuda_graph_impl == "none"


def test_a_job_with_cuda_graphs_runs_without_a_gpu() -> None:
    build = make_job(*GRAPHS)
    config = ModelConfig.from_dict(build.document)
    build.check(config, 1)
    assert build.make_builder(config).transformer_config.cuda_graph_impl == "none"


UNSUPPORTED = {
    "overlap_moe_expert_parallel_comm": True,
    "num_microbatches_with_partial_activation_checkpoints": 1,
    "qk_clip": True,
    "log_max_attention_logit": True,
    "moe_expert_rank_capacity_factor": 1.5,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_features_missing_from_the_training_loop_are_refused(name: str) -> None:
    build = make_job()
    config: Any = ModelConfig.from_dict(build.document)
    setattr(config.transformer, name, UNSUPPORTED[name])
    with pytest.raises(TrainingError, match=f"cannot train with {name}: set it"):
        build.check(config, 1)


@pytest.mark.parametrize("implementation", ["transformer_engine", "full_iteration"])
def test_graphs_that_are_never_captured_are_refused_on_a_gpu(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    build = make_job("transformer.use_te_rng_tracker=true", f"transformer.cuda_graph_impl={implementation}")
    with pytest.raises(TrainingError, match="cannot train with cuda_graph_impl: set it to local or none"):
        build.check(ModelConfig.from_dict(build.document), 1)
