"""Documents of the reference and of Megatron Bridge are read, and written for them; the real reference is the judge."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.config.errors import DocumentError
from bridge.config.foreign.recognize import adopted
from bridge.config.foreign.run_config import to_run_config

CORE = "megatron.core.transformer.transformer_config"
REFERENCE = "megatron.training.models.gpt.GPTModelConfig"
PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
LLAMA31 = "megatron.bridge.models.llama.llama_provider.Llama31ModelProvider"
BACKEND = "megatron.core.transformer.enums.AttnBackend"
OURS = "bridge.models.gpt.GPTModelConfig"
HYBRID = "megatron.training.models.hybrid.HybridModelConfig"
HYBRID_PROVIDER = "megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider"
T5_PROVIDER = "megatron.bridge.models.t5_provider.T5ModelProvider"


def nested(transformer: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    inner = {"_target_": f"{CORE}.TransformerConfig", "num_layers": 2, "activation_func": "silu"}
    known = {"transformer_layer_spec": None}
    return {"_target_": REFERENCE, "transformer": inner | (transformer or {})} | known | top


def flat(cls: str = PROVIDER, **given: Any) -> dict[str, Any]:
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
        {"_target_": OURS, "transformer": {}},
        {"_target_": OURS, "model": {"_target_": REFERENCE}},
        {"_target_": "my.Config", "model": nested()},
        {"_target_": ["megatron.training."]},
        {"_target_": "megatron.trainings.Config"},
        {"model": {"_target_": OURS}},
        {"model": None},
        {},
        [],
        None,
    ],
)
def test_other_documents_are_returned_themselves(data: Any) -> None:
    result = adopted(data)
    assert result.data is data
    assert not result.notes and not result.problems  # noqa: PT018


@pytest.mark.parametrize(
    "name",
    [
        REFERENCE,
        "megatron.bridge.models.gpt.gpt_builder.GPTModelConfig",
        "megatron.bridge.models.gpt.mcore_gpt_compat.GPTModelConfig",
        "megatron.bridge.compat.mcore_gpt.GPTModelConfig",
        "megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig",
    ],
)
def test_the_names_of_a_gpt(name: str) -> None:
    builder = REFERENCE.replace("Config", "Builder")
    data = nested(_builder_=builder, vocab_size=64) | {"_target_": name}
    before = copy.deepcopy(data)
    result = adopted(data)
    assert result.data == {
        "_target_": OURS,
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
        # Its code scales the embedding: no field says so.
        (
            "megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider2B",
            f"does not know what GemmaModelProvider2B adds: if it adds nothing but values to one of these, write its "
            f"name here: {PROVIDER!r}, {HYBRID_PROVIDER!r}, {T5_PROVIDER!r}",
        ),
        (
            "megatron.bridge.models.other.model_config.OtherModelConfig",
            f"write its name here: {REFERENCE!r}, {HYBRID!r}",
        ),
        ("megatron.training.config.container.PretrainConfigContainer", "does not know what"),
    ],
)
def test_models_that_bridge_has_not_are_refused_by_name(name: str, said: str) -> None:
    for data, path in (
        ({"_target_": name}, "$._target_"),
        ({"model": {"_target_": name}, "ddp": {}}, "$.model._target_"),
    ):
        with pytest.raises(DocumentError) as caught:
            adopted(data)
        [problem] = caught.value.problems
        assert problem.path == path
        assert said in problem.message


@pytest.mark.parametrize("container", [None, "megatron.bridge.training.config.ConfigContainer"])
def test_a_run_config_is_its_model(container: str | None) -> None:
    head = {"_target_": container} if container else {}
    result = adopted({**head, "ddp": {}, "model": nested(typo=3), "train": {"x": 1}})
    assert result.data == adopted(nested()).data
    assert result.notes == ["left out, Bridge reads the model alone: ddp, train"]
    assert dict(result.moves)[()] == ("model",)
    assert [path for path, _ in result.problems] == [("model", "typo")]


def test_a_provider_is_parted_into_model_and_transformer() -> None:
    result = adopted({"model": flat(num_layers=2, vocab_size=64, bf16=True)})
    assert result.data["_target_"] == OURS
    assert result.data["vocab_size"] == 64
    assert result.data["transformer"] == {
        "_target_": f"{CORE}.TransformerConfig",
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "attention_softmax_in_fp32": False,
        "deallocate_pipeline_outputs": True,
        "cross_entropy_loss_fusion": True,
        "num_layers": 2,
        "bf16": True,
    }
    moves = dict(result.moves)
    assert moves["transformer", "num_layers"] == ("model", "num_layers")
    assert moves[("transformer",)] == ("model",)  # where a missing field would have stood
    assert not result.notes + result.problems


def test_the_defaults_of_a_provider_are_written_out_where_ours_differ() -> None:
    result = adopted({"_target_": PROVIDER, "num_layers": 2})
    assert result.data["share_embeddings_and_output_weights"] is True
    assert result.data["transformer"]["attention_softmax_in_fp32"] is False
    assert "$.share_embeddings_and_output_weights: True written out, the default of a GPTModelProvider" in result.notes


def test_a_latent_attention_provider_has_such_a_transformer() -> None:
    cls = "megatron.bridge.models.deepseek.deepseek_provider.DeepSeekV3ModelProvider"
    data = adopted(flat(cls, multi_latent_attention=True, q_lora_rank=8, rotary_base=50000.0)).data
    assert data["transformer"]["_target_"] == f"{CORE}.MLATransformerConfig"
    assert data["transformer"]["q_lora_rank"] == 8
    assert data["transformer"]["rotary_base"] == 50000
    assert "rotary_base" not in data


def test_a_heterogeneous_provider_has_such_a_transformer() -> None:
    data = adopted(flat(heterogeneous_layers_config_path="layers.json")).data
    assert data["transformer"]["_target_"].endswith(".HeterogeneousTransformerConfig")


@pytest.mark.parametrize(
    ("written", "ours"),
    [
        (
            {"_target_": BACKEND, "_call_": True, "_args_": [5], "_name_": "auto"},
            {"_target_": BACKEND, "_name_": "auto"},
        ),
        ({"_target_": BACKEND, "_call_": True, "_args_": [1]}, {"_target_": BACKEND, "_name_": "flash"}),
        ("flash", "flash"),
    ],
)
def test_enumerations(written: Any, ours: Any) -> None:
    assert adopted(nested({"attention_backend": written})).data["transformer"]["attention_backend"] == ours


@pytest.mark.parametrize(
    ("written", "ours"),
    [
        ("silu", "silu"),
        ("relu2", "squared_relu"),
        ("gelu_pytorch_tanh", "fast_gelu"),
        ("torch.nn.functional.sigmoid", "torch.sigmoid"),
        (
            {"_target_": "torch._C._nn.gelu", "_call_": False},
            {"_target_": "torch.nn.functional.gelu", "_call_": False},
        ),
        (
            {"_target_": "torch.nn.functional.silu", "_callable_": True},
            {"_target_": "torch.nn.functional.silu", "_call_": False},
        ),
    ],
)
def test_activation_functions(written: Any, ours: Any) -> None:
    assert adopted(nested({"activation_func": written})).data["transformer"]["activation_func"] == ours


def test_partials_lose_only_what_says_nothing() -> None:
    written = {"_target_": "torch.nn.init.normal_", "_partial_": True, "_args_": [], "mean": 0.0, "std": 0.02}
    ours = {"_target_": "torch.nn.init.normal_", "_partial_": True, "mean": 0.0, "std": 0.02}
    assert adopted(nested({"init_method": written})).data["transformer"]["init_method"] == ours
    with_argument = written | {"_args_": [0.5]}
    assert adopted(nested({"init_method": with_argument})).data["transformer"]["init_method"]["_args_"] == [0.5]


def test_a_generation_config() -> None:
    cls = "transformers.generation.configuration_utils.GenerationConfig"
    settings = {"_from_model_config": True, "top_k": 5, "eos_token_id": [1, 2]}
    written = {"_target_": f"{cls}.from_dict", "_call_": True, "config_dict": settings}
    found = adopted(flat(generation_config=written)).data["generation_config"]
    assert found == {"_target_": cls, "top_k": 5, "eos_token_id": [1, 2]}


def test_numbers_and_truth_values_as_providers_write_them() -> None:
    data = adopted(flat(rotary_base=500000.0, use_te_rng_tracker=None, hidden_dropout=0.0)).data
    assert (data["rotary_base"], type(data["rotary_base"])) == (500000, int)
    assert data["transformer"]["use_te_rng_tracker"] is False
    assert type(data["transformer"]["hidden_dropout"]) is float
    assert adopted(flat(rotary_base=0.5)).data["rotary_base"] == 0.5  # the reader refuses it


def test_layer_specs_of_the_reference_are_ours() -> None:
    for module in ("megatron.training.models.gpt", "megatron.bridge.models.gpt_provider"):
        spec = {"_target_": f"{module}.default_layer_spec", "_call_": False}
        found = adopted(flat(transformer_layer_spec=spec)).data["transformer_layer_spec"]
        assert found == {"_target_": "bridge.models.layer_specs.default_layer_spec", "_call_": False}


def test_layers_that_the_default_would_choose_are_left_to_it() -> None:
    name = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec"
    spec = {"_target_": name, "_partial_": True, "_args_": [], "use_transformer_engine": True}
    moe = adopted(flat(transformer_layer_spec=spec, num_moe_experts=4))
    assert moe.data["transformer_layer_spec"] is None
    assert "left to the default" in moe.notes[0]
    dense = adopted(flat(transformer_layer_spec=spec)).data
    assert dense["transformer_layer_spec"]["_target_"] == name


def test_what_a_training_loop_set_is_left_out() -> None:
    timers = {"_target_": "megatron.core.timers.Timers", "_call_": True}
    result = adopted(flat(timers=timers, no_sync_func=None, _cpu_offloading_context=None))
    assert not result.data["transformer"].keys() & {"timers", "no_sync_func", "_cpu_offloading_context"}
    assert result.notes == [
        "left out, set by the training loop: timers",
        "left out, private or computed: _cpu_offloading_context",
    ]


def test_unknown_fields_are_told_if_off_and_refused_if_not() -> None:
    result = adopted(nested({"old_flag": False, "old_list": [], "old_size": 4}, logit_dtype=None, zero=0))
    assert result.notes == [
        "left out, off, and unknown to Bridge: transformer.old_flag, transformer.old_list, logit_dtype"
    ]
    assert [path for path, _ in result.problems] == [("transformer", "old_size"), ("zero",)]


def test_fields_without_a_part_in_the_model_are_left_out() -> None:
    result = adopted(flat(max_position_embeddings=4096))
    assert result.notes == ["left out, without a part in the model: max_position_embeddings"]


def test_llama_31_as_older_providers_scaled_it() -> None:
    numbers = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
    result = adopted(flat(LLAMA31, scale_factor=32.0, **numbers))
    assert result.data["rope_scaling"] is True
    assert result.data["rope_scaling_factor"] == 32.0
    assert dict(result.moves)[("rope_scaling_factor",)] == ("scale_factor",)
    other = adopted(flat(LLAMA31, scale_factor=32.0, **numbers | {"high_freq_factor": 2.0}))
    assert [path for path, _ in other.problems] == [("high_freq_factor",)]


def test_an_activation_function_that_was_not_written_is_told() -> None:
    data = nested({"gated_linear_unit": True})
    del data["transformer"]["activation_func"], data["transformer_layer_spec"]
    activation, layers = adopted(data).notes
    assert "no activation function" in activation
    assert "this transformer is gated: GELU is assumed; set transformer.activation_func" in activation
    assert "the default layers are assumed" in layers


def test_of_two_owners_the_transformer_is_believed() -> None:
    data = nested({"_target_": f"{CORE}.MLATransformerConfig", "rotary_base": 5}, rotary_base=10000)
    result = adopted(data)
    assert result.data["transformer"]["rotary_base"] == 5
    assert "rotary_base" not in result.data
    assert result.notes == ["$.rotary_base: 10000 left out, transformer.rotary_base is 5"]
    twice = adopted(nested({"hidden_size": 8}, hidden_size=16))
    assert [path for path, _ in twice.problems] == [("hidden_size",)]


@pytest.mark.parametrize("transformer", [None, 3, [1]])
def test_a_transformer_that_is_no_mapping_is_left_to_the_reader(transformer: Any) -> None:
    data = {"_target_": REFERENCE, "transformer": transformer, "vocab_size": 3}
    if transformer is None:
        assert adopted(data).data["transformer"] == {"_target_": f"{CORE}.TransformerConfig"}
    else:
        assert adopted(data).data["transformer"] == transformer


def test_it_needs_no_torch_and_imports_nothing() -> None:
    code = (
        "import sys, json; from bridge.config.foreign.recognize import adopted, to_run_config;"
        "made = adopted(json.loads(sys.argv[1])); to_run_config(made.data);"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(flat(num_layers=2))], capture_output=True, text=True, check=True
    )
    assert not set(run.stdout.split()) & {"torch", "megatron", "transformers"}


@pytest.mark.parametrize("name", ["my.Config", "bridge.models.t5.T5ModelConfig"])
def test_only_models_that_the_reference_has_are_written_for_it(name: str) -> None:
    with pytest.raises(DocumentError, match=r"only a bridge\.models\.gpt.* or bridge\.models\.mamba.* can be written"):
        to_run_config({"_target_": name})


def test_what_the_reference_cannot_say_is_told() -> None:
    data = {
        "_target_": OURS,
        "_builder_": "my.Builder",
        "_omitted_": [{"path": "$.transformer.init_method", "reason": "a lambda"}],
        "hf_model_id": "me/mine",
        "pre_wrap_hooks": ["my.hook"],
        "post_wrap_hooks": [],
        "transformer": {"_target_": f"{CORE}.TransformerConfig", "_version_": 1, "window_size": [4, 0]},
    }
    result = to_run_config(data)
    assert result.notes == [
        "left out, of Bridge alone: the builder my.Builder",
        "left out, the reference has no form for it: hf_model_id",
        "left out, the reference has no form for it: pre_wrap_hooks",
        "left out, as in the document: $.transformer.init_method",
        "a list to the reference, not a tuple: transformer.window_size",
    ]
    assert result.data == {
        "_target_": REFERENCE,
        "_builder_": "megatron.training.models.gpt.GPTModelBuilder",
        "transformer": {"_target_": f"{CORE}.TransformerConfig", "window_size": [4, 0]},
    }


names = (
    st.sampled_from([REFERENCE, PROVIDER, BACKEND, f"{CORE}.MLATransformerConfig", "torch.bfloat16", "a"]) | st.none()
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


@given(anything, st.sampled_from([REFERENCE, PROVIDER, HYBRID, HYBRID_PROVIDER, T5_PROVIDER]))
def test_any_data_is_adopted_or_refused(data: Any, name: str) -> None:
    documents = [data]
    if isinstance(data, dict):
        documents += [{**data, "_target_": name}, {"model": {**data, "_target_": name}}]
    for document in documents:
        before = copy.deepcopy(document)
        try:
            result = adopted(document)
        except DocumentError:
            continue
        assert repr(document) == repr(before)
        assert all(isinstance(path, tuple) for path, _ in result.problems)
        assert not isinstance(result.data, dict) or result.data.get("_target_") not in (REFERENCE, PROVIDER, HYBRID)


# Hybrid models.

HYBRID_BUILDER = "megatron.training.models.hybrid.HybridModelBuilder"


def hybrid(cls: str = HYBRID, transformer: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    inner = {"_target_": f"{CORE}.TransformerConfig", "num_layers": 2, "activation_func": "relu2"}
    known = {"hybrid_stack_spec": None, "hybrid_layer_pattern": "M*"}
    return {"_target_": cls, "transformer": inner | (transformer or {})} | known | top


def flat_hybrid(cls: str = HYBRID_PROVIDER, **given: Any) -> dict[str, Any]:
    known = {
        "activation_func": "squared_relu",
        "hybrid_stack_spec": None,
        "hybrid_layer_pattern": "M*",
        "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
        "bf16": True,
        "num_attention_heads": 4,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "apply_rope_fusion": False,
        "attention_backend": "auto",
        "deallocate_pipeline_outputs": True,
        "bias_dropout_fusion": False,
        "cross_entropy_loss_fusion": False,
    }
    return {"_target_": cls, **known, **given}


@pytest.mark.parametrize(
    ("name", "builder"),
    [
        (HYBRID, HYBRID_BUILDER),
        (
            "megatron.bridge.models.hybrid.hybrid_builder.HybridModelConfig",
            "megatron.bridge.models.hybrid.HybridModelBuilder",
        ),
        (
            "megatron.bridge.models.mamba.mamba_builder.MambaModelConfig",
            "megatron.bridge.models.mamba.MambaModelBuilder",
        ),
        ("megatron.bridge.models.nemotronh.model_config.NemotronHModelConfig", HYBRID_BUILDER),
    ],
)
def test_the_names_of_a_hybrid_model(name: str, builder: str) -> None:
    result = adopted({"model": hybrid(name, _builder_=builder, vocab_size=64, hybrid_mlp_ratio=0.0)})
    assert result.data == {
        "_target_": "bridge.models.mamba.MambaModelConfig",
        "_builder_": "bridge.models.mamba.MambaModelBuilder",
        "transformer": {"_target_": f"{CORE}.TransformerConfig", "num_layers": 2, "activation_func": "squared_relu"},
        "hybrid_stack_spec": None,
        "hybrid_layer_pattern": "M*",
        "vocab_size": 64,
    }
    assert result.notes == ["left out, off, and unknown to Bridge: hybrid_mlp_ratio"]
    assert not result.problems


def test_old_names_of_a_hybrid_model() -> None:
    data = hybrid(hybrid_override_pattern="M-", mamba_stack_spec=None)
    del data["hybrid_layer_pattern"], data["hybrid_stack_spec"]
    result = adopted(data)
    assert result.data["hybrid_layer_pattern"] == "M-"
    assert dict(result.moves)[("hybrid_layer_pattern",)] == ("hybrid_override_pattern",)
    same = adopted(hybrid(hybrid_override_pattern="M*"))
    assert same.data["hybrid_layer_pattern"] == "M*"
    assert same.notes == ["left out, an old name that says nothing new: hybrid_override_pattern"]
    both = adopted(hybrid(hybrid_override_pattern="M-"))
    assert [path for path, _ in both.problems] == [("hybrid_override_pattern",)]
    ratio = adopted(hybrid(hybrid_attention_ratio=0.5))
    assert [path for path, _ in ratio.problems] == [("hybrid_attention_ratio",)]


def test_a_hybrid_provider_is_parted_into_model_and_transformer() -> None:
    name = "megatron.bridge.models.hybrid.hybrid_provider.get_default_hybrid_stack_spec"
    spec = {"_target_": name, "_call_": False}
    result = adopted({"model": flat_hybrid(num_layers=2, vocab_size=64, hybrid_stack_spec=spec, mtp_num_layers=0)})
    assert result.data["hybrid_stack_spec"] == {
        "_target_": "bridge.models.hybrid_layers.default_stack_spec",
        "_call_": False,
    }
    assert result.data["vocab_size"] == 64
    assert result.data["transformer"]["num_layers"] == 2
    assert result.data["transformer"]["mtp_num_layers"] is None
    assert dict(result.moves)["transformer", "num_layers"] == ("model", "num_layers")
    assert not result.notes + result.problems


def test_the_defaults_of_a_hybrid_provider_are_written_out() -> None:
    result = adopted({"_target_": HYBRID_PROVIDER, "hybrid_layer_pattern": "MM*", "activation_func": "silu"})
    assert result.data["transformer"]["bf16"] is True
    assert result.data["transformer"]["normalization"] == "RMSNorm"
    assert result.data["transformer"]["num_layers"] == 3
    assert "$.bf16: True written out, the default of a HybridModelProvider" in result.notes
    assert "transformer.num_layers: 3 written out, as hybrid_layer_pattern has them" in result.notes


def test_other_defaults_of_a_named_provider_are_told() -> None:
    name = "megatron.bridge.models.nemotronh.nemotron_h_provider.NemotronHModelProvider8B"
    *_, told, _ = adopted({"_target_": name, "hidden_size": 4096, "activation_func": "relu2"}).notes
    assert told.startswith("Bridge's defaults are taken, which may not be those of NemotronHModelProvider8B: ")
    assert ", ffn_hidden_size," in told
    assert ", hidden_size," not in told
    assert " and 2" in told  # and some two hundred more
    assert len(told) < 700


def test_the_pattern_of_multi_token_prediction_is_joined() -> None:
    data = hybrid(transformer={"mtp_num_layers": 2}, mtp_hybrid_override_pattern="*E", keep_mtp_spec_in_bf16=False)
    result = adopted(data)
    assert result.data["hybrid_layer_pattern"] == "M*/*E/*E"
    assert not result.problems
    assert result.notes == [
        "hybrid_layer_pattern is now 'M*/*E/*E', with mtp_hybrid_override_pattern in it",
        "left out, off, and unknown to Bridge: keep_mtp_spec_in_bf16",
    ]
    unified = adopted(hybrid(hybrid_layer_pattern="M*/*E", mtp_hybrid_override_pattern="*E"))
    assert unified.data["hybrid_layer_pattern"] == "M*/*E"
    assert unified.notes == ["left out, without a part in the model: mtp_hybrid_override_pattern"]


def test_layers_of_multi_token_prediction_are_left_out_only_if_they_are_the_default() -> None:
    name = "megatron.bridge.models.mamba.mamba_provider.get_default_mamba_stack_spec"
    usual = adopted(hybrid(mtp_mamba_stack_spec={"_target_": name, "_call_": False}))
    assert usual.notes == ["left out, the default, which Bridge chooses by itself: mtp_mamba_stack_spec"]
    other = adopted(hybrid(mtp_mamba_stack_spec={"_target_": "my.spec", "_call_": False}))
    assert [path for path, _ in other.problems] == [("mtp_mamba_stack_spec",)]


def test_layers_of_no_pattern_are_told() -> None:
    assert "the document has no hybrid_layer_pattern: Mamba layers alone are assumed" in (
        adopted(hybrid(hybrid_layer_pattern=None)).notes
    )


def test_an_activation_function_in_the_metadata_is_taken() -> None:
    data = hybrid(extra_checkpoint_metadata={"megatron_bridge.activation_func": "relu2"})
    del data["transformer"]["activation_func"]
    result = adopted(data)
    assert result.data["transformer"]["activation_func"] == "squared_relu"
    assert result.notes == ["transformer.activation_func: relu2 taken from extra_checkpoint_metadata"]


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
def test_a_pattern_is_written_as_the_reference_splits_it(
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


def test_what_a_hybrid_model_of_the_reference_has_not_is_told() -> None:
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
        "left out, the reference has no form for it: scatter_embedding_sequence_parallel",
        "left out, the reference has no form for it: transformer.yarn_beta_fast",
    ]


def test_yarn_in_a_provider_has_such_a_transformer() -> None:
    result = adopted(flat(position_embedding_type="yarn", yarn_beta_fast=32.0, yarn_mscale=None))
    assert result.data["transformer"]["_target_"] == "bridge.models.transformer.YarnTransformerConfig"
    assert result.data["transformer"]["yarn_beta_fast"] == 32.0
    off = adopted(flat(yarn_beta_fast=None))
    assert off.data["transformer"]["_target_"] == f"{CORE}.TransformerConfig"
    assert off.notes == ["left out, off, and unknown to Bridge: yarn_beta_fast"]


# T5.

T5_KNOWN = {
    "apply_rope_fusion": False,
    "attention_softmax_in_fp32": False,
    "bias_activation_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "bias_dropout_fusion": False,
    "deallocate_pipeline_outputs": True,
    "activation_func": "relu",
    "encoder_pipeline_model_parallel_size": 0,
}


def test_a_t5_provider() -> None:
    spec = {"_target_": "megatron.bridge.models.t5_provider.transformer_engine_layer_spec", "_call_": False}
    sizes = {"num_layers": 2, "encoder_num_layers": 3, "max_position_embeddings": 512, "seq_length": 512}
    result = adopted(
        {"_target_": T5_PROVIDER, **T5_KNOWN, **sizes, "seq_length_dec": 128, "transformer_layer_spec": spec}
    )
    assert result.data["_target_"] == "bridge.models.t5.T5ModelConfig"
    assert (result.data["seq_length"], result.data["encoder_num_layers"]) == (512, 3)
    assert result.data["transformer"]["num_layers"] == 2
    assert "transformer_layer_spec" not in result.data
    assert not result.problems
    assert result.notes == [
        "$.transformer_layer_spec: left to the default, with transformer_impl transformer_engine",
        "left out, off, and unknown to Bridge: encoder_pipeline_model_parallel_size",
        "left out, without a part in the model: seq_length, seq_length_dec",
    ]
    other = adopted(
        {"_target_": T5_PROVIDER, **T5_KNOWN, **sizes, "encoder_pipeline_model_parallel_size": 2, "typo": 1}
    )
    assert [path for path, _ in other.problems] == [("encoder_pipeline_model_parallel_size",), ("typo",)]


# The real reference.


@pytest.fixture(scope="module")
def reference() -> Any:
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
    """What the reference's own YAML writer makes of live data, read back as plain data."""
    import yaml
    from megatron.training.config.yaml_utils import safe_yaml_representers

    with safe_yaml_representers():
        return yaml.safe_load(yaml.safe_dump(data))


def same(value: Any, other: Any) -> bool:
    if isinstance(value, partial) and isinstance(other, partial):
        return (value.func, value.args, value.keywords) == (other.func, other.args, other.keywords)
    if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(value) == list(other)
    return bool(value == other) and type(value) is type(other)


def differing(config: Any, other: Any) -> list[str]:
    return [f.name for f in fields(config) if not same(getattr(config, f.name), getattr(other, f.name))]


def live(config: Any) -> Any:
    return config.as_dict()


def written(config: Any) -> Any:
    return as_yaml(config.as_dict())


def run_config(config: Any) -> Any:
    return {"model": as_yaml(config.as_dict()), "train": {"train_iters": 5}}


def provider(config: Any) -> Any:
    """As a GPTModelProvider, which writes functions too, in a run_config.yaml."""
    top = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("transformer", "post_wrap_hooks")}
    inner = {f.name: getattr(config.transformer, f.name) for f in fields(config.transformer)}
    return {"model": as_yaml({"_target_": PROVIDER} | top | inner)}


# The reference's as_dict leaves out functions.
LOST = ["activation_func", "init_method", "output_layer_init_method", "embedding_init_method"]


@pytest.mark.parametrize(("form", "lost"), [(live, LOST), (written, LOST), (run_config, LOST), (provider, [])])
def test_what_the_reference_writes_is_read(reference: Any, form: Callable[[Any], Any], lost: list[str]) -> None:
    from bridge.config import ModelConfig

    theirs = reference.GPTModelConfig(transformer=transformer(), **TOP)
    ours: Any = ModelConfig.from_dict(form(theirs))
    assert type(ours).__module__ == "bridge.models.gpt"
    assert set(differing(theirs.transformer, ours.transformer)) <= set(lost)
    shared = [f.name for f in fields(theirs) if f.name not in ("transformer", "extra_checkpoint_metadata")]
    assert [name for name in shared if getattr(theirs, name) != getattr(ours, name)] == []


def test_an_activation_function_that_bridge_learns_of_is_kept(reference: Any) -> None:
    import torch

    from bridge.config import ModelConfig

    data = reference.GPTModelConfig(transformer=transformer(), **TOP).as_dict()
    data["transformer"]["activation_func"] = "silu"  # as Megatron Bridge's own config writes it
    ours: Any = ModelConfig.from_dict(data)
    assert ours.transformer.activation_func is torch.nn.functional.silu


@pytest.mark.parametrize("given", [{}, {"num_moe_experts": 4, "add_bias_linear": False}])
def test_the_reference_reads_what_we_write(reference: Any, given: dict[str, Any]) -> None:
    """Through its `instantiate`, as it reads a run_config.yaml, and through its `from_dict`; equal field by field."""
    import yaml
    from megatron.training.config.instantiate_utils import instantiate

    from bridge.config import ModelConfig

    theirs = reference.GPTModelConfig(transformer=transformer(**given), **TOP)
    section = to_run_config(ModelConfig.from_dict(provider(theirs)).as_dict())
    assert section.notes == ["a list to the reference, not a tuple: transformer.window_size"]
    read = yaml.safe_load(yaml.safe_dump(section.data))
    assert read == section.data

    again = instantiate(read)
    assert type(again) is reference.GPTModelConfig
    assert differing(theirs.transformer, again.transformer) == []
    assert [f.name for f in fields(theirs) if f.name != "transformer" and f.name in differing(theirs, again)] == []

    # Its from_dict takes live values, and every mapping with a `_target_` for a config.
    leaves = {
        key: instantiate(value) if isinstance(value, dict) else value for key, value in read["transformer"].items()
    }
    again = reference.GPTModelConfig.from_dict(read | {"transformer": leaves})
    assert again.get_builder_cls() is reference.GPTModelBuilder
    assert differing(theirs.transformer, again.transformer) == []


def test_the_values_of_enumerations_count_from_one() -> None:
    """What lets a member be found by its value without the class."""
    import inspect
    from enum import Enum

    enums = pytest.importorskip("megatron.core.transformer.enums")
    found = [cls for _, cls in inspect.getmembers(enums, inspect.isclass) if issubclass(cls, Enum) and list(cls)]
    assert len(found) > 5
    for cls in found:
        if cls.__module__ == enums.__name__:
            assert [member.value for member in cls] == list(range(1, len(cls) + 1))


def test_a_run_config_returns_as_it_went(reference: Any) -> None:
    from bridge.config import ModelConfig

    theirs = reference.GPTModelConfig(transformer=transformer(), **TOP)
    ours = ModelConfig.from_dict(provider(theirs)).as_dict()
    again = ModelConfig.from_dict(to_run_config(ours).data).as_dict()
    assert again == ours
