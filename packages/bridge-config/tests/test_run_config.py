"""run_config.yaml files are read and written, checked with the installed megatron.training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import pytest

from bridge.config.errors import DocumentError
from bridge.config.foreign.recognize import convert_foreign
from bridge.config.foreign.run_config import to_run_config
from bridge.config.schema.registry import get_document_name

CORE = "megatron.core.transformer.transformer_config"
MEGATRON_TRAINING = "megatron.training.models.gpt.GPTModelConfig"
PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
BRIDGE = "bridge.models.gpt.GPTModelConfig"
HYBRID = "megatron.training.models.hybrid.HybridModelConfig"


def nested_model(transformer: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    inner = {"_target_": f"{CORE}.TransformerConfig", "num_layers": 2, "activation_func": "silu"}
    known = {"transformer_layer_spec": None}
    return {"_target_": MEGATRON_TRAINING, "transformer": inner | (transformer or {})} | known | top


@pytest.mark.parametrize("container", [None, "megatron.bridge.training.config.ConfigContainer"])
def test_a_run_config_is_read_as_its_model(container: str | None) -> None:
    head = {"_target_": container} if container else {}
    result = convert_foreign({**head, "ddp": {}, "model": nested_model(typo=3), "train": {"x": 1}})
    assert result.data == convert_foreign(nested_model()).data
    assert result.notes == ["left out, Bridge reads only the model: ddp, train"]
    assert dict(result.moves)[()] == ("model",)
    assert [path for path, _ in result.problems] == [("model", "typo")]


@pytest.mark.parametrize("name", ["my.Config", "bridge.models.t5.T5ModelConfig"])
def test_only_models_of_megatron_training_can_be_written(name: str) -> None:
    with pytest.raises(DocumentError, match=r"only bridge\.models\.gpt.* or bridge\.models\.mamba.* can be written"):
        to_run_config({"_target_": name})


def test_values_that_megatron_training_cannot_express_are_noted() -> None:
    data = {
        "_target_": BRIDGE,
        "_builder_": "my.Builder",
        "_omitted_": [{"path": "$.transformer.init_method", "reason": "a lambda"}],
        "hf_model_id": "me/mine",
        "pre_wrap_hooks": ["my.hook"],
        "post_wrap_hooks": [],
        "transformer": {"_target_": f"{CORE}.TransformerConfig", "_version_": 1, "window_size": [4, 0]},
    }
    result = to_run_config(data)
    assert result.notes == [
        "left out, specific to Bridge: the builder my.Builder",
        "left out, megatron.training has no field for it: hf_model_id",
        "left out, megatron.training has no field for it: pre_wrap_hooks",
        "left out, as in the document: $.transformer.init_method",
        "read by megatron.training as a list, not a tuple: transformer.window_size",
    ]
    assert result.data == {
        "_target_": MEGATRON_TRAINING,
        "_builder_": "megatron.training.models.gpt.GPTModelBuilder",
        "transformer": {"_target_": f"{CORE}.TransformerConfig", "window_size": [4, 0]},
    }


HYBRID_BUILDER = "megatron.training.models.hybrid.HybridModelBuilder"


@pytest.mark.parametrize(
    ("layout", "pattern", "written"),
    [
        ({}, None, "MMMM"),
        ({}, "M*|M*", "M*M*"),
        ({}, "M*M*/*", "M*M*/*"),
        ({"pipeline_model_parallel_size": 2}, "M*|M*", "M*|M*"),
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, "M*M*/*", "M|*|M|*/*"),
    ],
)
def test_hybrid_patterns_are_split_as_in_megatron_training(
    layout: dict[str, int], pattern: str | None, written: str
) -> None:
    data = {
        "_target_": "bridge.models.mamba.MambaModelConfig",
        "hybrid_layer_pattern": pattern,
        "transformer": {"_target_": f"{CORE}.TransformerConfig", "num_layers": 4, **layout},
        "scatter_embedding_sequence_parallel": True,
    }
    result = to_run_config(data)
    assert result.data["hybrid_layer_pattern"] == written
    assert result.data["_target_"] == HYBRID
    assert result.data["_builder_"] == HYBRID_BUILDER
    assert "scatter_embedding_sequence_parallel" not in result.data
    assert bool(result.notes) == (written != pattern)


def test_hybrid_fields_that_megatron_training_lacks_are_noted() -> None:
    yarn = {"_target_": "bridge.models.transformer.YarnTransformerConfig", "num_layers": 1, "yarn_beta_fast": 16.0}
    data = {
        "_target_": "bridge.models.mamba.MambaModelConfig",
        "hybrid_layer_pattern": "M",
        "scatter_embedding_sequence_parallel": False,
        "transformer": yarn,
    }
    result = to_run_config(data)
    assert result.data["transformer"] == {"_target_": f"{CORE}.TransformerConfig", "num_layers": 1}
    assert result.notes == [
        "left out, megatron.training has no field for it: scatter_embedding_sequence_parallel",
        "left out, megatron.training has no field for it: transformer.yarn_beta_fast",
    ]


# With the installed megatron.training.


@pytest.fixture(scope="module")
def megatron_training() -> Any:
    pytest.importorskip("omegaconf")
    return pytest.importorskip("megatron.training.models.gpt")


def transformer(**given: Any) -> Any:
    import torch
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "attention_backend": AttnBackend.flash,
        "window_size": (4, 0),
        "init_method": partial(torch.nn.init.normal_, mean=0.0, std=0.03),
        "moe_layer_freq": [1, 0, 1, 0],
        "pipeline_model_parallel_size": 2,
        "pipeline_dtype": torch.bfloat16,
    }
    return TransformerConfig(**values | given)


TOP = {"vocab_size": 128, "position_embedding_type": "rope", "rotary_base": 500000, "should_pad_vocab": True}


def as_yaml(data: Any) -> Any:
    """Return data as written by megatron.training's YAML writer and parsed again."""
    import yaml
    from megatron.training.config.yaml_utils import safe_yaml_representers

    with safe_yaml_representers():
        return yaml.safe_load(yaml.safe_dump(data))


def is_equal(value: Any, other: Any) -> bool:
    if isinstance(value, partial) and isinstance(other, partial):
        return (value.func, value.args, value.keywords) == (other.func, other.args, other.keywords)
    if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(value) == list(other)
    return bool(value == other) and type(value) is type(other)


def differing_fields(config: Any, other: Any) -> list[str]:
    return [f.name for f in fields(config) if not is_equal(getattr(config, f.name), getattr(other, f.name))]


def as_data(config: Any) -> Any:
    return config.as_dict()


def as_parsed_yaml(config: Any) -> Any:
    return as_yaml(config.as_dict())


def as_run_config(config: Any) -> Any:
    return {"model": as_yaml(config.as_dict()), "train": {"train_iters": 5}}


def as_provider_run_config(config: Any) -> Any:
    """Return the run_config.yaml of an equal GPTModelProvider, which contains functions, too."""
    top = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("transformer", "post_wrap_hooks")}
    inner = {f.name: getattr(config.transformer, f.name) for f in fields(config.transformer)}
    return {"model": as_yaml({"_target_": PROVIDER} | top | inner)}


# as_dict of megatron.training leaves out functions.
FUNCTION_FIELDS = ["activation_func", "init_method", "output_layer_init_method", "embedding_init_method"]


@pytest.mark.parametrize(
    ("form", "lost"),
    [
        (as_data, FUNCTION_FIELDS),
        (as_parsed_yaml, FUNCTION_FIELDS),
        (as_run_config, FUNCTION_FIELDS),
        (as_provider_run_config, []),
    ],
)
def test_run_configs_of_megatron_training_are_read(
    megatron_training: Any, form: Callable[[Any], Any], lost: list[str]
) -> None:
    from bridge.config import ModelConfig

    megatron_config = megatron_training.GPTModelConfig(transformer=transformer(), **TOP)
    bridge_config: Any = ModelConfig.from_dict(form(megatron_config))
    assert get_document_name(type(bridge_config)) == "bridge.models.gpt.GPTModelConfig"
    assert set(differing_fields(megatron_config.transformer, bridge_config.transformer)) <= set(lost)
    shared = [f.name for f in fields(megatron_config) if f.name not in ("transformer", "extra_checkpoint_metadata")]
    assert [name for name in shared if getattr(megatron_config, name) != getattr(bridge_config, name)] == []


def test_an_activation_function_in_the_run_config_is_kept(megatron_training: Any) -> None:
    import torch

    from bridge.config import ModelConfig

    data = megatron_training.GPTModelConfig(transformer=transformer(), **TOP).as_dict()
    data["transformer"]["activation_func"] = "silu"  # as Megatron Bridge's own config writes it
    bridge_config: Any = ModelConfig.from_dict(data)
    assert bridge_config.transformer.activation_func is torch.nn.functional.silu


@pytest.mark.parametrize("given", [{}, {"num_moe_experts": 4, "add_bias_linear": False}])
def test_megatron_training_reads_written_run_configs(megatron_training: Any, given: dict[str, Any]) -> None:
    """Its `instantiate`, which reads run_config.yaml, and its `from_dict` give configs with equal fields."""
    import yaml
    from megatron.training.config.instantiate_utils import instantiate

    from bridge.config import ModelConfig

    megatron_config = megatron_training.GPTModelConfig(transformer=transformer(**given), **TOP)
    section = to_run_config(ModelConfig.from_dict(as_provider_run_config(megatron_config)).as_dict())
    assert section.notes == ["read by megatron.training as a list, not a tuple: transformer.window_size"]
    read = yaml.safe_load(yaml.safe_dump(section.data))
    assert read == section.data

    again = instantiate(read)
    assert type(again) is megatron_training.GPTModelConfig
    assert differing_fields(megatron_config.transformer, again.transformer) == []
    assert [
        f.name
        for f in fields(megatron_config)
        if f.name != "transformer" and f.name in differing_fields(megatron_config, again)
    ] == []

    # Its from_dict expects live values and takes every mapping with a `_target_` for a config.
    leaves = {
        key: instantiate(value) if isinstance(value, dict) else value for key, value in read["transformer"].items()
    }
    again = megatron_training.GPTModelConfig.from_dict(read | {"transformer": leaves})
    assert again.get_builder_cls() is megatron_training.GPTModelBuilder
    assert differing_fields(megatron_config.transformer, again.transformer) == []


def test_enumeration_values_count_from_one() -> None:
    """Bridge relies on this to find a member by its value without importing the class."""
    import inspect
    from enum import Enum

    enums = pytest.importorskip("megatron.core.transformer.enums")
    found = [cls for _, cls in inspect.getmembers(enums, inspect.isclass) if issubclass(cls, Enum) and list(cls)]
    assert len(found) > 5
    for cls in found:
        if cls.__module__ == enums.__name__:
            assert [member.value for member in cls] == list(range(1, len(cls) + 1))


def test_a_run_config_survives_the_round_trip(megatron_training: Any) -> None:
    from bridge.config import ModelConfig

    megatron_config = megatron_training.GPTModelConfig(transformer=transformer(), **TOP)
    bridge_config = ModelConfig.from_dict(as_provider_run_config(megatron_config)).as_dict()
    again = ModelConfig.from_dict(to_run_config(bridge_config).data).as_dict()
    assert again == bridge_config
