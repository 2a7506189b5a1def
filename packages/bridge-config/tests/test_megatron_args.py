"""Arguments from Megatron-LM checkpoints, as JSON, are converted to documents.

bridge-models/tests/test_reference_models.py compares the models with those of Megatron-LM's real parser.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.config import Document, DocumentError
from bridge.config.foreign.argument_names import load_arguments
from bridge.config.foreign.recognize import convert_foreign

GPT = "bridge.models.gpt.GPTModelConfig"
MAMBA = "bridge.models.mamba.MambaModelConfig"
T5 = "bridge.models.t5.T5ModelConfig"
CORE = "megatron.core.transformer.transformer_config"


def arguments(**given: Any) -> dict[str, Any]:
    """Return all arguments of the parser, with the given values."""
    sizes = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "seq_length": 32,
        "max_position_embeddings": 32,
        "padded_vocab_size": 128,
        "tokenizer_type": "NullTokenizer",
    }
    return load_arguments() | sizes | given


def convert_arguments(**given: Any) -> Any:
    result = convert_foreign(arguments(**given))
    assert not result.problems
    Document(result.data).check()
    return result.data


def problems(**given: Any) -> dict[str, str]:
    return {str(path[-1]): message for path, message in convert_foreign(arguments(**given)).problems}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("([0]*1+[1]*3)", [0, 1, 1, 1]),
        ("([0]*3+[1]*1)*3", [0, 0, 0, 1] * 3),
        ("[1]+2*[0]", [1, 0, 0]),
        (" [1, 0, 1] ", [1, 0, 1]),
        ("2", 2),
    ],
)
@pytest.mark.parametrize("name", ["moe_layer_freq", "window_attn_skip_freq", "no_rope_freq"])
def test_layer_patterns_are_evaluated(name: str, text: str, value: Any) -> None:
    # The values are what the parser of Megatron-LM says of each in its help.
    layers = len(value) if isinstance(value, list) else 4
    assert convert_arguments(num_layers=layers, num_experts=4, **{name: text})["transformer"].get(name, 2) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "[1",
        "[True]",
        "[1.0]",
        "['a']",
        "[[1]]",
        "[1]*[2]",
        "1+1",
        "[1]-[0]",
        "[1]**2",
        "[1]*10**9",
        "([1]*9999)*9999",
        "(" * 5000 + "[1]" + ")" * 4000,
        "[-1]",
        "__import__('os').getpid()",
        "[x for x in (1,)]",
        "[1]" + "+[1]" * 3000,
        "+".join(["[0]*9999"] * 900),  # short, but nine million items
    ],
)
def test_invalid_layer_patterns_are_refused(text: str) -> None:
    assert "expected an integer or a pattern" in problems(num_experts=4, moe_layer_freq=text)["moe_layer_freq"]


def test_disabled_initialization_is_noted() -> None:
    assert any(
        "perform_initialization: kept as false" in note
        for note in convert_foreign(arguments(perform_initialization=False)).notes
    )
    assert not any(
        "perform_initialization" in note for note in convert_foreign(arguments(perform_initialization=True)).notes
    )


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
        {"swiglu": True},
        {"transformer": {}, "swiglu": True, "num_experts": 2},
        {"_target_": GPT, "swiglu": True, "num_experts": 2},
        {"args": {"_target_": GPT, "swiglu": True, "num_experts": 2}},
        {"args": None, "model": {}},
        # A config.json of Hugging Face.
        {"model_type": "gpt_neo", "num_layers": 2, "hidden_size": 64, "num_heads": 4, "max_position_embeddings": 8},
    ],
)
def test_other_documents_are_returned_unchanged(data: Any) -> None:
    result = convert_foreign(data)
    assert result.data is data
    assert not result.notes + result.problems


def test_arguments_that_lack_sizes_are_refused() -> None:
    data = {"args": {"swiglu": True, "padded_vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4}}
    with pytest.raises(DocumentError) as caught:
        convert_foreign(data)
    [problem] = caught.value.problems
    assert problem.path == "$.args"
    assert "arguments of Megatron-LM (padded_vocab_size, swiglu), but some are missing: num_layers, max_pos" in (
        problem.message
    )


def test_gpt_arguments_are_converted() -> None:
    result = convert_foreign({"args": arguments(), "iteration": 100, "checkpoint_version": 3.0})
    assert result.data["_target_"] == GPT
    assert result.data["transformer"]["_target_"] == f"{CORE}.TransformerConfig"
    assert result.data["transformer"]["num_layers"] == 4
    assert (result.data["vocab_size"], result.data["should_pad_vocab"]) == (128, False)
    assert result.data["share_embeddings_and_output_weights"] is True
    moves = dict(result.moves)
    assert moves[("vocab_size",)] == ("args", "padded_vocab_size")
    assert moves["transformer", "hidden_size"] == ("args", "hidden_size")
    assert not result.problems


def test_arguments_that_are_left_out_are_noted_by_name() -> None:
    result = convert_foreign(
        arguments(lr=0.1, save="/tmp/x", consumed_train_samples=5, DDP_impl="local", seq_length=16)
    )
    note, left_out = result.notes
    assert note == (
        "$.seq_length: 16 left out, it is the length of training samples: $.seq_length is max_position_embeddings"
    )
    told, _, usual = left_out.rpartition(", ")
    assert told.startswith("left out, no effect on the model: ")
    assert {"lr", "save", "consumed_train_samples", "DDP_impl"} <= set(told.partition(": ")[2].split(", "))
    assert "micro_batch_size" not in told
    assert usual.endswith(" more with default values")
    assert int(usual.split()[0]) > 400


def test_unknown_arguments_are_noted_if_disabled_and_refused_otherwise() -> None:
    result = convert_foreign(arguments(my_flag=False, my_size=3, my_path=None))
    assert result.problems == [(("my_size",), "unknown to Bridge: remove it if it does not affect the model")]
    assert "left out, disabled and unknown to Bridge: my_flag, my_path" in result.notes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("te_precision_config_file", "recipe.yaml"),
        ("kitchen_recipe_number", 1),
        ("yaml_cfg", "model.yaml"),
        ("retro_add_retriever", True),
        ("hybrid_attention_ratio", 0.5),
        ("vision_pretraining", True),
        ("encoder_tensor_model_parallel_size", 2),
        ("spec", ["my.layers", "my_spec"]),
        ("heterogeneous_layers_config_path", "blocks.json"),
        ("num_layers_per_virtual_pipeline_stage", 2),
        ("add_position_embedding", False),
        ("rope_type", "yarn"),
    ],
)
def test_arguments_without_a_field_are_refused_by_name(name: str, value: Any) -> None:
    assert list(problems(**{name: value})) == [name]


def test_switches_that_contradict_each_other_are_refused() -> None:
    assert list(problems(disable_bias_linear=True, add_bias_linear=True)) == ["disable_bias_linear"]
    assert not problems(disable_bias_linear=True, add_bias_linear=False)


def test_two_activation_functions_are_refused() -> None:
    assert problems(swiglu=True, squared_relu=True) == {
        "squared_relu": "conflicts with swiglu: set only one activation function"
    }


@pytest.mark.parametrize(
    ("given", "function", "gated"),
    [
        ({}, "torch.nn.functional.gelu", False),
        ({"swiglu": True}, "torch.nn.functional.silu", True),
        ({"squared_relu": True}, "megatron.core.activations.squared_relu", False),
    ],
)
def test_activation_functions_are_converted(given: dict[str, Any], function: str, gated: bool) -> None:
    transformer = convert_arguments(**given)["transformer"]
    assert transformer["activation_func"] == function
    assert transformer["gated_linear_unit"] is gated


def test_gated_layers_without_a_size_are_narrower() -> None:
    assert (
        convert_arguments(swiglu=True, hidden_size=1024, ffn_hidden_size=None)["transformer"]["ffn_hidden_size"] == 2688
    )
    assert "ffn_hidden_size" not in convert_arguments(hidden_size=1024, ffn_hidden_size=None)["transformer"]
    assert convert_arguments(swiglu=True, ffn_hidden_size=96)["transformer"]["ffn_hidden_size"] == 96


def test_switches_and_renamed_arguments_are_converted() -> None:
    data = convert_arguments(
        no_persist_layer_norm=True,
        disable_bias_linear=True,
        add_bias_linear=None,
        num_experts=8,
        fp8_param_gather=True,
        decoder_first_pipeline_num_layers=1,
        overlap_p2p_comm=True,
        init_method_xavier_uniform=True,
        cp_comm_type=["p2p"],
        seed=7,
        bf16=True,
    )
    expected = {
        "persist_layer_norm": False,
        "add_bias_linear": False,
        "num_moe_experts": 8,
        "fp8_param": True,
        "num_layers_in_first_pipeline_stage": 1,
        "batch_p2p_comm": False,
        "init_method": "torch.nn.init.xavier_uniform_",
        "cp_comm_type": "p2p",
        "inference_sampling_seed": 7,
        "params_dtype": "torch.bfloat16",
        "pipeline_dtype": "torch.bfloat16",
        "deallocate_pipeline_outputs": True,
    }
    assert {name: data["transformer"][name] for name in expected} == expected


def test_query_groups_are_ignored_unless_enabled() -> None:
    assert "num_query_groups" not in convert_arguments(num_query_groups=2, group_query_attention=False)["transformer"]
    assert convert_arguments(num_query_groups=2, group_query_attention=True)["transformer"]["num_query_groups"] == 2


def test_enumerations_and_dtypes_are_read_as_python_prints_them() -> None:
    data = convert_arguments(
        attention_backend="AttnBackend.fused",
        cuda_graph_modules=["CudaGraphModule.attn"],
        params_dtype="torch.float16",
        fp16=True,
    )
    assert data["transformer"]["attention_backend"] == "fused"
    assert data["transformer"]["cuda_graph_modules"] == ["attn"]
    assert data["transformer"]["pipeline_dtype"] == "torch.float16"
    with pytest.raises(DocumentError, match="attention_backend: expected one of"):
        Document(arguments(attention_backend="AttnBackend.none")).check()


def test_position_embeddings_are_converted() -> None:
    rotary = convert_arguments(use_rotary_position_embeddings=True, rotary_base=5, use_rope_scaling=True)
    assert rotary["position_embedding_type"] == "rope"
    assert (rotary["rotary_base"], rotary["rope_scaling"]) == (5, True)
    yarn = convert_arguments(position_embedding_type="yarn", rotary_scaling_factor=32.0, yarn_beta_fast=16.0)
    assert yarn["transformer"]["_target_"].endswith("YarnTransformerConfig")
    assert yarn["transformer"]["yarn_rotary_scaling_factor"] == 32.0
    assert (yarn["transformer"]["yarn_beta_fast"], yarn["transformer"]["yarn_beta_slow"]) == (16.0, 1.0)
    note = convert_foreign(arguments(use_rope_scaling=True, rope_scaling_factor=32.0)).notes[0]
    assert note.startswith("$.rope_scaling_factor: 32.0 left out, Megatron-LM ignores it and scales by 8.0")


def test_latent_attention_gives_an_mla_transformer() -> None:
    data = convert_arguments(multi_latent_attention=True, q_lora_rank=16, rope_type="rope", rotary_base=5)
    assert data["transformer"]["_target_"] == f"{CORE}.MLATransformerConfig"
    assert (data["transformer"]["q_lora_rank"], data["transformer"]["rotary_base"]) == (16, 5)
    assert "rotary_base" not in data
    assert convert_arguments(multi_latent_attention=True, q_lora_rank=None)["transformer"]["q_lora_rank"] is None


def test_heterogeneous_blocks_are_converted() -> None:
    blocks = json.dumps({"block_configs": []})
    data = convert_arguments(heterogeneous_layers_config_path="b.json", heterogeneous_layers_config_encoded_json=blocks)
    assert data["transformer"]["_target_"].endswith(".HeterogeneousTransformerConfig")
    assert data["transformer"]["heterogeneous_layers_config_encoded_json"] == blocks


def test_an_unpadded_vocabulary_is_marked_for_padding() -> None:
    data = convert_arguments(padded_vocab_size=None, vocab_size=100, make_vocab_size_divisible_by=64)
    assert (data["vocab_size"], data["should_pad_vocab"], data["make_vocab_size_divisible_by"]) == (100, True, 64)
    both = convert_foreign(arguments(padded_vocab_size=128, vocab_size=100))
    assert "$.vocab_size: 100 left out, $.vocab_size is padded_vocab_size" in both.notes
    without = convert_foreign(arguments(padded_vocab_size=None, vocab_size=None))
    assert "the arguments have no vocabulary size: set vocab_size" in without.notes
    assert "vocab_size" not in without.data


def test_hybrid_arguments_are_converted() -> None:
    given = {"num_layers": None, "mamba_num_groups": 2, "hybrid_layer_pattern": "M--D", "multi_latent_attention": True}
    data = convert_arguments(**given, untie_embeddings_and_output_weights=True)
    assert data["_target_"] == MAMBA
    assert data["hybrid_layer_pattern"] == "M--D"
    assert data["share_embeddings_and_output_weights"] is False
    transformer = data["transformer"]
    assert (transformer["num_layers"], transformer["is_hybrid_model"]) == (4, True)
    assert transformer["experimental_attention_variant"] == "dsa"


def test_older_hybrid_arguments_are_converted() -> None:
    given = {"hybrid_override_pattern": "M*M*", "mtp_hybrid_override_pattern": "*", "mtp_num_layers": 2}
    given |= {"mamba_num_groups": 2}
    data = convert_arguments(**given, spec=["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"])
    assert data["hybrid_layer_pattern"] == "M*M*/*/*"
    assert data["transformer"]["mtp_num_layers"] == 2
    assert (
        convert_arguments(num_layers=2, mamba_num_groups=2, hybrid_layer_pattern="MM/M")["transformer"][
            "mtp_num_layers"
        ]
        == 1
    )
    pure = convert_arguments(
        mamba_num_groups=2, spec=["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]
    )
    assert (pure["_target_"], pure["transformer"]["num_layers"]) == (MAMBA, 4)


@pytest.mark.parametrize(
    "marks",
    [{"decoder_num_layers": 2}, {"decoder_seq_length": 16}, {"model_type": "ModelType.encoder_and_decoder"}],
)
def test_t5_arguments_are_converted(marks: dict[str, Any]) -> None:
    data = convert_arguments(
        num_layers=4, encoder_num_layers=4, position_embedding_type="relative", vocab_extra_ids=100, **marks
    )
    assert data["_target_"] == T5
    assert data["encoder_num_layers"] == 4
    assert data["transformer"]["num_layers"] == marks.get("decoder_num_layers", 4)
    assert data["position_embedding_type"] == "relative"


def test_problems_have_lines_and_overrides_apply_to_the_model(tmp_path: Path) -> None:
    file = tmp_path / "args.json"
    file.write_text(json.dumps(arguments(hidden_size="wide"), indent=1))
    with pytest.raises(DocumentError) as caught:
        Document.load(file).check()
    [problem] = caught.value.problems
    assert problem.path == "$.hidden_size"
    assert '"hidden_size"' in file.read_text().splitlines()[(problem.line or 0) - 1]
    made = Document.load(file, ["hidden_size=64", "transformer.num_layers=2", "padded_vocab_size=256"])
    made.migrate()
    assert made.data["transformer"]["num_layers"] == 2
    assert made.data["vocab_size"] == 256


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("transformer.persist_layer_norm=false", "transformer.persist_layer_norm", False),
        ("transformer.add_bias_linear=false", "transformer.add_bias_linear", False),
        ("transformer.activation_func=relu", "transformer.activation_func", "relu"),
        ("transformer.batch_p2p_comm=false", "transformer.batch_p2p_comm", False),
        ("transformer.num_moe_experts=8", "transformer.num_moe_experts", 8),
        ("transformer.ffn_hidden_size=100", "transformer.ffn_hidden_size", 100),
        ("transformer.params_dtype=torch.float16", "transformer.params_dtype", "torch.float16"),
        ("share_embeddings_and_output_weights=false", "share_embeddings_and_output_weights", False),
        ("should_pad_vocab=true", "should_pad_vocab", True),
        ("rope_scaling=true", "rope_scaling", True),
    ],
)
def test_overrides_of_converted_names_take_precedence(override: str, path: str, value: Any) -> None:
    document = Document(arguments(disable_bias_linear=False, no_persist_layer_norm=False))
    document.override([override])
    document.migrate()
    assert document.get(path) == value


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, json; from bridge.config import Document; Document(json.loads(sys.stdin.read())).check();"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(arguments()), capture_output=True, text=True, check=True
    )
    assert not set(run.stdout.split()) & {"torch", "megatron", "transformers"}


names = st.sampled_from([*load_arguments(), "num_query_groups", "model_type", "retro_cyclic_train_iters", "other"])
values = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=3) | st.lists(st.just("a"))


@given(st.dictionaries(names, values | st.dictionaries(st.text(max_size=2), values, max_size=2), max_size=8))
def test_any_arguments_are_converted_or_refused(changed: dict[str, Any]) -> None:
    data = arguments(**changed)
    before = copy.deepcopy(data)
    try:
        result = convert_foreign(data)
    except DocumentError:
        return
    assert repr(data) == repr(before)
    assert isinstance(result.data, dict)
    assert all(isinstance(path, tuple) for path, _ in result.problems)
