"""Generation settings are checked against the vocabulary and sequence length of every model family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.config import DocumentError, ModelConfig
from bridge.models.errors import ModelConfigError
from bridge.models.gpt import GPTModelConfig
from bridge.models.mamba import MambaModelConfig
from bridge.models.t5 import T5ModelConfig

Settings = Callable[..., Any]


@pytest.fixture(params=[GPTModelConfig, T5ModelConfig, MambaModelConfig], ids=lambda cls: cls.__name__)
def config(request: pytest.FixtureRequest) -> Any:
    transformer = TransformerConfig(
        num_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        mamba_num_groups=1,
        is_hybrid_model=request.param is MambaModelConfig,
    )
    return request.param(transformer=transformer, vocab_size=100, seq_length=64, should_pad_vocab=True)


@pytest.fixture(params=["object", "mapping"])
def settings(request: pytest.FixtureRequest) -> Settings:
    if request.param == "mapping":
        return dict
    made: Settings = pytest.importorskip("transformers").GenerationConfig
    return made


def test_settings_that_fit_are_accepted(config: Any, settings: Settings) -> None:
    config.generation_config = settings(eos_token_id=[1, 99], pad_token_id=0, max_length=64, max_new_tokens=64)
    config.finalize()
    assert ModelConfig.from_dict(config.as_dict()).generation_config


def test_a_token_in_the_vocabulary_padding_is_refused(config: Any, settings: Settings) -> None:
    config.generation_config = settings(eos_token_id=[1, 100], max_new_tokens=65)
    said = (
        r"generation_config\.eos_token_id: token ids must be less than vocab_size = 100, got 100; "
        r"generation_config\.max_new_tokens: must be at most seq_length = 64, got 65"
    )
    with pytest.raises(ModelConfigError, match=said):
        config.validate()
    with pytest.raises(DocumentError) as caught:
        ModelConfig.from_dict(config.as_dict())
    paths = [problem.path for problem in caught.value.problems]
    assert paths == ["$.generation_config.eos_token_id", "$.generation_config.max_new_tokens"]
