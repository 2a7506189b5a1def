"""Objects of other libraries in documents: layer specs of megatron-core, generation settings of transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from bridge.config import Document, ModelConfig, OmittedWarning
from bridge.config.canonical import canonicalize
from bridge.config.text.parse import parse_yaml

pytest.importorskip("megatron.core")

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from bridge.models.gpt import GPTModelConfig

TRANSFORMER: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}


def specs() -> Iterator[tuple[str, Any]]:
    for experts in (None, 4):
        for qk_layernorm in (False, True):
            for latent in (False, True):
                name = f"experts={experts}-qk_layernorm={qk_layernorm}-latent={latent}"
                yield (
                    name,
                    gpt_layer_specs.get_gpt_layer_local_spec(
                        num_experts=experts, qk_layernorm=qk_layernorm, multi_latent_attention=latent
                    ),
                )
    yield "rms", gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    yield "l2", gpt_layer_specs.get_gpt_layer_local_spec(qk_l2_norm=True)


def is_equal(left: Any, right: Any) -> bool:
    """Compare values and types; specs and partials define no equality."""
    if type(left) is not type(right):
        return False
    if isinstance(left, functools.partial):
        return left.func == right.func and is_equal(left.args, right.args) and is_equal(left.keywords, right.keywords)
    if is_dataclass(left) and not isinstance(left, type):
        return all(is_equal(getattr(left, one.name), getattr(right, one.name)) for one in fields(left))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(is_equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(is_equal, left, right))
    return bool(left == right)


def round_trip(config: ModelConfig) -> Any:
    document = Document(config.as_dict())
    assert "_omitted_" not in document.data
    data = json.loads(document.to_json())
    assert parse_yaml(document.to_yaml()).data == data
    assert canonicalize(data)["_target_"] == data["_target_"], "the shipped table contains all of its names"
    return ModelConfig.from_dict(data)


@pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in specs()])
def test_a_layer_spec_survives(spec: Any) -> None:
    config = GPTModelConfig(transformer=TransformerConfig(**TRANSFORMER), vocab_size=64, transformer_layer_spec=spec)
    back = round_trip(config)
    assert is_equal(back.transformer_layer_spec, spec)
    assert is_equal(ModelConfig.from_dict(back.as_dict()).transformer_layer_spec, spec)  # type: ignore[attr-defined]


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_callable_that_returns_a_spec_survives(latent: bool) -> None:
    transformer = (MLATransformerConfig if latent else TransformerConfig)(**TRANSFORMER)
    made_by = functools.partial(gpt_layer_specs.get_gpt_layer_local_spec, multi_latent_attention=latent)
    config = GPTModelConfig(transformer=transformer, vocab_size=64, transformer_layer_spec=made_by)
    back = round_trip(config)
    assert is_equal(back.transformer_layer_spec, made_by)
    assert isinstance(back.transformer_layer_spec(), ModuleSpec)


def test_generation_settings_survive() -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.GenerationConfig(max_new_tokens=7, temperature=0.5, do_sample=True, eos_token_id=[2, 3])
    config = GPTModelConfig(transformer=TransformerConfig(**TRANSFORMER), vocab_size=64, generation_config=settings)
    back = round_trip(config)
    assert type(back.generation_config) is transformers.GenerationConfig
    assert back.generation_config.to_dict() == settings.to_dict()


def test_a_spec_with_an_unknown_module_is_declared_omitted() -> None:
    class Unknown: ...

    spec = ModuleSpec(module=Unknown)
    config = GPTModelConfig(transformer=TransformerConfig(**TRANSFORMER), vocab_size=64, transformer_layer_spec=spec)
    with pytest.warns(OmittedWarning, match="transformer_layer_spec.module"):
        data = config.as_dict()
    assert [entry["path"] for entry in data["_omitted_"]] == ["$.transformer_layer_spec.module"]
