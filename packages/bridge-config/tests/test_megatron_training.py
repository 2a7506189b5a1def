"""GPT models of megatron.training and Megatron Bridge, and fields of all models, are converted to Bridge documents."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.config.errors import DocumentError
from bridge.config.foreign.recognize import convert_foreign

CORE = "megatron.core.transformer.transformer_config"
MEGATRON_TRAINING = "megatron.training.models.gpt.GPTModelConfig"
PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
LLAMA31 = "megatron.bridge.models.llama.llama_provider.Llama31ModelProvider"
BACKEND = "megatron.core.transformer.enums.AttnBackend"
BRIDGE = "bridge.models.gpt.GPTModelConfig"
HYBRID = "megatron.training.models.hybrid.HybridModelConfig"
HYBRID_PROVIDER = "megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider"
T5_PROVIDER = "megatron.bridge.models.t5_provider.T5ModelProvider"


def nested_model(transformer: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    inner = {"_target_": f"{CORE}.TransformerConfig", "num_layers": 2, "activation_func": "silu"}
    known = {"transformer_layer_spec": None}
    return {"_target_": MEGATRON_TRAINING, "transformer": inner | (transformer or {})} | known | top


def flat_provider(cls: str = PROVIDER, **given: Any) -> dict[str, Any]:
    known = {
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "transformer_layer_spec": None,
        "share_embeddings_and_output_weights": False,
        "attention_softmax_in_fp32": False,
        "deallocate_pipeline_outputs": True,
        "cross_entropy_loss_fusion": True,
    }
    return {"_target_": cls, **known, **given}


@pytest.mark.parametrize(
    "data",
    [
        {"_target_": BRIDGE, "transformer": {}},
        {"_target_": BRIDGE, "model": {"_target_": MEGATRON_TRAINING}},
        {"_target_": "my.Config", "model": nested_model()},
        {"_target_": ["megatron.training."]},
        {"_target_": "megatron.trainings.Config"},
        {"model": {"_target_": BRIDGE}},
        {"model": None},
        {},
        [],
        None,
    ],
)
def test_other_documents_are_returned_unchanged(data: Any) -> None:
    result = convert_foreign(data)
    assert result.data is data
    assert not result.notes and not result.problems  # noqa: PT018


@pytest.mark.parametrize(
    "name",
    [
        MEGATRON_TRAINING,
        "megatron.bridge.models.gpt.gpt_builder.GPTModelConfig",
        "megatron.bridge.models.gpt.mcore_gpt_compat.GPTModelConfig",
        "megatron.bridge.compat.mcore_gpt.GPTModelConfig",
        "megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig",
    ],
)
def test_gpt_fields_are_renamed(name: str) -> None:
    builder = MEGATRON_TRAINING.replace("Config", "Builder")
    data = nested_model(_builder_=builder, vocab_size=64) | {"_target_": name}
    before = copy.deepcopy(data)
    result = convert_foreign(data)
    assert result.data == {
        "_target_": BRIDGE,
        "_builder_": "bridge.models.gpt.GPTModelBuilder",
        "transformer": before["transformer"],
        "transformer_layer_spec": None,
        "vocab_size": 64,
    }
    assert data == before
    assert not result.notes + result.problems + result.moves


@pytest.mark.parametrize(
    ("name", "said"),
    [
        # Its code scales the embedding, which no field expresses.
        (
            "megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider2B",
            "does not know what GemmaModelProvider2B adds: if it only changes defaults of one of these, write that "
            f"name here: {PROVIDER!r}, {HYBRID_PROVIDER!r}, {T5_PROVIDER!r}",
        ),
        (
            "megatron.bridge.models.other.model_config.OtherModelConfig",
            f"write that name here: {MEGATRON_TRAINING!r}, {HYBRID!r}",
        ),
        ("megatron.training.config.container.PretrainConfigContainer", "does not know what"),
    ],
)
def test_unsupported_models_are_refused_by_name(name: str, said: str) -> None:
    for data, path in (
        ({"_target_": name}, "$._target_"),
        ({"model": {"_target_": name}, "ddp": {}}, "$.model._target_"),
    ):
        with pytest.raises(DocumentError) as caught:
            convert_foreign(data)
        [problem] = caught.value.problems
        assert problem.path == path
        assert said in problem.message


def test_a_provider_is_split_into_model_and_transformer() -> None:
    result = convert_foreign({"model": flat_provider(num_layers=2, vocab_size=64, bf16=True)})
    assert result.data["_target_"] == BRIDGE
    assert result.data["vocab_size"] == 64
    assert result.data["transformer"] == {
        "_target_": f"{CORE}.TransformerConfig",
        "activation_func": "torch.nn.functional.silu",
        "attention_softmax_in_fp32": False,
        "deallocate_pipeline_outputs": True,
        "cross_entropy_loss_fusion": True,
        "num_layers": 2,
        "bf16": True,
    }
    moves = dict(result.moves)
    assert moves["transformer", "num_layers"] == ("model", "num_layers")
    assert moves[("transformer",)] == ("model",)  # the position where the missing field would be
    assert not result.notes + result.problems


def test_provider_defaults_that_differ_are_written_out() -> None:
    result = convert_foreign({"_target_": PROVIDER, "num_layers": 2})
    assert result.data["share_embeddings_and_output_weights"] is True
    assert result.data["transformer"]["attention_softmax_in_fp32"] is False
    assert "$.share_embeddings_and_output_weights: set to True, the default of GPTModelProvider" in result.notes


def test_a_latent_attention_provider_gives_an_mla_transformer() -> None:
    cls = "megatron.bridge.models.deepseek.deepseek_provider.DeepSeekV3ModelProvider"
    data = convert_foreign(flat_provider(cls, multi_latent_attention=True, q_lora_rank=8, rotary_base=50000.0)).data
    assert data["transformer"]["_target_"] == f"{CORE}.MLATransformerConfig"
    assert data["transformer"]["q_lora_rank"] == 8
    assert data["transformer"]["rotary_base"] == 50000
    assert "rotary_base" not in data


def test_a_heterogeneous_provider_gives_a_heterogeneous_transformer() -> None:
    data = convert_foreign(flat_provider(heterogeneous_layers_config_path="layers.json")).data
    assert data["transformer"]["_target_"].endswith(".HeterogeneousTransformerConfig")


@pytest.mark.parametrize(
    ("written", "converted"),
    [
        ({"_target_": BACKEND, "_call_": True, "_args_": [5], "_name_": "auto"}, "auto"),
        ({"_target_": BACKEND, "_call_": True, "_args_": [1]}, "flash"),
        ("flash", "flash"),
    ],
)
def test_enumerations_are_converted(written: Any, converted: Any) -> None:
    assert (
        convert_foreign(nested_model({"attention_backend": written})).data["transformer"]["attention_backend"]
        == converted
    )


@pytest.mark.parametrize(
    ("written", "converted"),
    [
        ("silu", "silu"),
        ("relu2", "squared_relu"),
        ("gelu_pytorch_tanh", "fast_gelu"),
        ("torch.nn.functional.sigmoid", "torch.sigmoid"),
        ({"_target_": "torch._C._nn.gelu", "_call_": False}, "torch.nn.functional.gelu"),
        ({"_target_": "torch.nn.functional.silu", "_callable_": True}, "torch.nn.functional.silu"),
    ],
)
def test_activation_functions_are_converted(written: Any, converted: Any) -> None:
    assert (
        convert_foreign(nested_model({"activation_func": written})).data["transformer"]["activation_func"] == converted
    )


def test_names_are_written_alone_only_where_the_annotation_determines_their_kind() -> None:
    dtype = {"_target_": "torch.bfloat16", "_call_": False}
    data = convert_foreign(nested_model({"params_dtype": dtype}, extra_checkpoint_metadata={"any": dtype})).data
    assert data["transformer"]["params_dtype"] == "torch.bfloat16"
    assert data["extra_checkpoint_metadata"] == {"any": dtype}


def test_partials_lose_only_empty_arguments() -> None:
    written = {"_target_": "torch.nn.init.normal_", "_partial_": True, "_args_": [], "mean": 0.0, "std": 0.02}
    converted = {"_target_": "torch.nn.init.normal_", "_partial_": True, "mean": 0.0, "std": 0.02}
    assert convert_foreign(nested_model({"init_method": written})).data["transformer"]["init_method"] == converted
    with_argument = written | {"_args_": [0.5]}
    assert convert_foreign(nested_model({"init_method": with_argument})).data["transformer"]["init_method"][
        "_args_"
    ] == [0.5]


def test_a_generation_config_is_converted() -> None:
    cls = "transformers.generation.configuration_utils.GenerationConfig"
    settings = {"_from_model_config": True, "top_k": 5, "eos_token_id": [1, 2]}
    written = {"_target_": f"{cls}.from_dict", "_call_": True, "config_dict": settings}
    found = convert_foreign(flat_provider(generation_config=written)).data["generation_config"]
    assert found == {"_target_": cls, "top_k": 5, "eos_token_id": [1, 2]}


def test_numbers_and_booleans_of_providers_are_converted() -> None:
    data = convert_foreign(flat_provider(rotary_base=500000.0, use_te_rng_tracker=None, hidden_dropout=0.0)).data
    assert (data["rotary_base"], type(data["rotary_base"])) == (500000, int)
    assert data["transformer"]["use_te_rng_tracker"] is False
    assert type(data["transformer"]["hidden_dropout"]) is float
    assert convert_foreign(flat_provider(rotary_base=0.5)).data["rotary_base"] == 0.5  # the reader reports it


def test_megatron_training_layer_specs_are_converted() -> None:
    for module in ("megatron.training.models.gpt", "megatron.bridge.models.gpt_provider"):
        spec = {"_target_": f"{module}.default_layer_spec", "_call_": False}
        found = convert_foreign(flat_provider(transformer_layer_spec=spec)).data["transformer_layer_spec"]
        assert found == "bridge.models.layer_specs.default_layer_spec"


def test_the_default_layer_spec_is_left_out() -> None:
    name = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec"
    spec = {"_target_": name, "_partial_": True, "_args_": [], "use_transformer_engine": True}
    moe = convert_foreign(flat_provider(transformer_layer_spec=spec, num_moe_experts=4))
    assert moe.data["transformer_layer_spec"] is None
    assert "left to the default" in moe.notes[0]
    dense = convert_foreign(flat_provider(transformer_layer_spec=spec)).data
    assert dense["transformer_layer_spec"]["_target_"] == name


def test_fields_set_by_a_training_loop_are_left_out() -> None:
    timers = {"_target_": "megatron.core.timers.Timers", "_call_": True}
    result = convert_foreign(flat_provider(timers=timers, no_sync_func=None, _cpu_offloading_context=None))
    assert not result.data["transformer"].keys() & {"timers", "no_sync_func", "_cpu_offloading_context"}
    assert result.notes == [
        "left out, set by the training loop: timers",
        "left out, private or computed: _cpu_offloading_context",
    ]


def test_unknown_fields_are_noted_if_disabled_and_refused_otherwise() -> None:
    result = convert_foreign(nested_model({"old_flag": False, "old_list": [], "old_size": 4}, logit_dtype=None, zero=0))
    assert result.notes == [
        "left out, disabled and unknown to Bridge: transformer.old_flag, transformer.old_list, logit_dtype"
    ]
    assert [path for path, _ in result.problems] == [("transformer", "old_size"), ("zero",)]


def test_fields_without_effect_on_the_model_are_left_out() -> None:
    result = convert_foreign(flat_provider(max_position_embeddings=4096))
    assert result.notes == ["left out, no effect on the model: max_position_embeddings"]


def test_llama_31_scaling_of_older_providers_is_converted() -> None:
    numbers = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
    result = convert_foreign(flat_provider(LLAMA31, scale_factor=32.0, **numbers))
    assert result.data["rope_scaling"] is True
    assert result.data["rope_scaling_factor"] == 32.0
    assert dict(result.moves)[("rope_scaling_factor",)] == ("scale_factor",)
    other = convert_foreign(flat_provider(LLAMA31, scale_factor=32.0, **numbers | {"high_freq_factor": 2.0}))
    assert [path for path, _ in other.problems] == [("high_freq_factor",)]


def test_a_missing_activation_function_is_noted() -> None:
    data = nested_model({"gated_linear_unit": True})
    del data["transformer"]["activation_func"], data["transformer_layer_spec"]
    activation, layers = convert_foreign(data).notes
    assert "no activation_func" in activation
    assert "this transformer is gated: GELU is assumed; set transformer.activation_func" in activation
    assert "the default layers are assumed" in layers


def test_the_transformer_wins_over_a_duplicate_outer_field() -> None:
    data = nested_model({"_target_": f"{CORE}.MLATransformerConfig", "rotary_base": 5}, rotary_base=10000)
    result = convert_foreign(data)
    assert result.data["transformer"]["rotary_base"] == 5
    assert "rotary_base" not in result.data
    assert result.notes == ["$.rotary_base: 10000 left out, transformer.rotary_base is 5"]
    twice = convert_foreign(nested_model({"hidden_size": 8}, hidden_size=16))
    assert [path for path, _ in twice.problems] == [("hidden_size",)]


@pytest.mark.parametrize("transformer", [None, 3, [1]])
def test_a_transformer_that_is_not_a_mapping_is_left_to_the_reader(transformer: Any) -> None:
    data = {"_target_": MEGATRON_TRAINING, "transformer": transformer, "vocab_size": 3}
    if transformer is None:
        assert convert_foreign(data).data["transformer"] == {"_target_": f"{CORE}.TransformerConfig"}
    else:
        assert convert_foreign(data).data["transformer"] == transformer


def test_it_needs_no_torch_and_imports_nothing() -> None:
    code = (
        "import sys, json; from bridge.config.foreign.recognize import convert_foreign;"
        "from bridge.config.foreign.run_config import to_run_config;"
        "made = convert_foreign(json.loads(sys.argv[1])); to_run_config(made.data);"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(flat_provider(num_layers=2))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not set(run.stdout.split()) & {"torch", "megatron", "transformers"}


names = (
    st.sampled_from([MEGATRON_TRAINING, PROVIDER, BACKEND, f"{CORE}.MLATransformerConfig", "torch.bfloat16", "a"])
    | st.none()
)


keys = st.sampled_from(
    [
        "_target_",
        "_call_",
        "_args_",
        "_name_",
        "_partial_",
        "_builder_",
        "model",
        "transformer",
        "activation_func",
        "rotary_base",
        "scale_factor",
        "transformer_layer_spec",
        "hybrid_layer_pattern",
        "hybrid_override_pattern",
        "mtp_hybrid_override_pattern",
        "mtp_num_layers",
        "mtp_use_repeated_layer",
        "mtp_mamba_stack_spec",
        "max_position_embeddings",
        "extra_checkpoint_metadata",
        "megatron_bridge.activation_func",
        "generation_config",
        "config_dict",
        "timers",
        "vocab_size",
        "num_layers",
        "other",
    ]
)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | st.integers(), inner, max_size=5),
    max_leaves=12,
)


@given(anything, st.sampled_from([MEGATRON_TRAINING, PROVIDER, HYBRID, HYBRID_PROVIDER, T5_PROVIDER]))
def test_any_data_is_converted_or_refused(data: Any, name: str) -> None:
    documents = [data]
    if isinstance(data, dict):
        documents += [{**data, "_target_": name}, {"model": {**data, "_target_": name}}]
    for document in documents:
        before = copy.deepcopy(document)
        try:
            result = convert_foreign(document)
        except DocumentError:
            continue
        assert repr(document) == repr(before)
        assert all(isinstance(path, tuple) for path, _ in result.problems)
        assert not isinstance(result.data, dict) or result.data.get("_target_") not in (
            MEGATRON_TRAINING,
            PROVIDER,
            HYBRID,
        )


def test_yarn_in_a_provider_gives_a_yarn_transformer() -> None:
    result = convert_foreign(flat_provider(position_embedding_type="yarn", yarn_beta_fast=32.0, yarn_mscale=None))
    assert result.data["transformer"]["_target_"] == "bridge.models.transformer.YarnTransformerConfig"
    assert result.data["transformer"]["yarn_beta_fast"] == 32.0
    off = convert_foreign(flat_provider(yarn_beta_fast=None))
    assert off.data["transformer"]["_target_"] == f"{CORE}.TransformerConfig"
    assert off.notes == ["left out, disabled and unknown to Bridge: yarn_beta_fast"]
