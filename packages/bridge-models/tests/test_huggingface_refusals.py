"""Conversions refuse fields that the other format cannot express, and note omitted fields without effect."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_meaning import Config

from bridge.config import Document, DocumentError
from bridge.models.huggingface import from_hf, to_hf

LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("model_type", "fields", "paths"),
    [
        ("llama", {"num_hidden_layers": "many"}, ["num_hidden_layers"]),
        ("llama", {"num_hidden_layers": 0}, ["num_hidden_layers"]),
        ("gpt_oss", {"num_hidden_layers": 10**12}, ["num_hidden_layers"]),
        ("llama", {"num_hidden_layers": True, "rms_norm_eps": "x"}, ["num_hidden_layers", "rms_norm_eps"]),
        ("llama", {"hidden_size": 9, "num_attention_heads": 2}, ["num_attention_heads"]),
        ("llama", {"attention_bias": True}, ["attention_bias"]),
        ("llama", {"hidden_act": "gelu_10"}, ["hidden_act"]),
        ("llama", {"torch_dtype": "int8"}, ["torch_dtype"]),
        ("llama", {"rope_theta": 10000.5}, ["rope_theta"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_scaling.type"]),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling.factor"]),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2, "x": 1}}, ["rope_scaling.x"]),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, ["rope_parameters.rope_type"]),
        ("llama", {"rope_parameters": {"rope_type": "lama3"}}, ["rope_parameters.rope_type"]),
        (
            "llama",
            {"rope_scaling": LLAMA3 | {"rope_type": "llama3", "low_freq_factor": 2.0, "high_freq_factor": 8.0}},
            ["rope_scaling.high_freq_factor", "rope_scaling.low_freq_factor"],
        ),
        ("llama", {"rope_scaling": YARN | {"attention_factor": 2.0}}, ["rope_scaling.attention_factor"]),
        ("llama", {"rope_scaling": YARN | {"truncate": 1}}, ["rope_scaling.truncate"]),
        ("llama", {"attn_logit_softcapping": 50.0, "hiden_size": 8}, ["attn_logit_softcapping", "hiden_size"]),
        ("llama", {"vocab_size": 100, "bos_token_id": 100}, ["bos_token_id"]),
        ("gpt2", {"embd_pdrop": 0.2}, ["embd_pdrop"]),
        ("gpt2", {"n_embd": 8, "hidden_size": 16}, ["hidden_size"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights"]),
        (
            "qwen2",
            {"num_hidden_layers": 2, "use_sliding_window": True, "layer_types": ["x"]},
            ["layer_types", "layer_types[0]"],
        ),
        ("qwen2", {"layer_types": ["sliding_attention"] * 32}, ["layer_types"]),
        ("qwen3", {"attention_bias": True}, ["attention_bias"]),
        ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise"]),
        ("mixtral", {"num_experts_per_tok": 1}, ["num_experts_per_tok"]),
        ("qwen3_moe", {"decoder_sparse_step": 99}, ["decoder_sparse_step"]),
        ("gpt_oss", {"swiglu_alpha": 1.0, "attention_bias": False}, ["attention_bias", "swiglu_alpha"]),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}},
            ["rope_scaling.type"],
        ),
        ("gemma", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("gemma", {"hidden_activation": "gelu_11"}, ["hidden_activation"]),
        ("gemma2", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "model_type"]),
        ("gemma3", {}, ["model_type"]),
        ("gemma3_text", {}, ["model_type"]),
        (
            "deepseek_v2",
            {"num_experts_per_tok": 6, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3},
            ["topk_method"],
        ),
        ("deepseek_v2", {}, ["num_experts_per_tok"]),
        ("deepseek_v3", {"rms_norm_eps": 1e-5, "rope_interleave": False}, ["rms_norm_eps", "rope_interleave"]),
        ("deepseek_v3", {"topk_group": 2}, ["topk_group"]),
        ("deepseek_v3", {"norm_topk_prob": False}, ["norm_topk_prob"]),
        ("deepseek_v3", {"num_key_value_heads": 1}, ["num_key_value_heads"]),
        ("deepseek_v3", {"rope_scaling": YARN | {"mscale_all_dim": 1.0}}, ["rope_scaling.mscale_all_dim"]),
        ("mamba2", {"layer_norm_epsilon": 1e-6, "conv_kernel": 3}, ["conv_kernel", "layer_norm_epsilon"]),
        ("mamba2", {"time_step_limit": [0.1, 1.0], "num_heads": 3}, ["num_heads", "time_step_limit"]),
        ("nemotron_h", {"hybrid_override_pattern": "M-X"}, ["hybrid_override_pattern"]),
        ("nemotron_h", {"hybrid_override_pattern": "M-", "tie_word_embeddings": True}, ["tie_word_embeddings"]),
        ("nemotron_h", {"layers_block_type": ["mamba", "moe", "x"]}, ["layers_block_type[2]"]),
        ("nemotron_h", {"hybrid_override_pattern": "M-", "num_hidden_layers": 3}, ["num_hidden_layers"]),
        ("nemotron_h", {"hybrid_override_pattern": "M", "num_nextn_predict_layers": 1}, ["num_nextn_predict_layers"]),
        (
            "t5",
            {"feed_forward_proj": "gated-tanh", "initializer_factor": 2.0},
            ["feed_forward_proj", "initializer_factor"],
        ),
    ],
)
def test_fields_that_a_document_cannot_express_are_refused_by_name(
    model_type: str, fields: Config, paths: list[str]
) -> None:
    with pytest.raises(DocumentError) as error:
        from_hf({"model_type": model_type} | fields)
    assert sorted(problem.path for problem in error.value.problems) == [f"$.{path}" for path in paths]


@pytest.mark.parametrize(
    ("preset", "override", "path"),
    [
        ("llama-3.1-8b", "transformer.activation_func_clamp_value=7.0", "activation_func_clamp_value"),
        ("llama-3.1-8b", "transformer.layernorm_zero_centered_gamma=true", "layernorm_zero_centered_gamma"),
        ("llama-3.1-8b", "transformer.mtp_num_layers=1", "mtp_num_layers"),
        ("llama-3.1-8b", "transformer.softmax_scale=1.0", "softmax_scale"),
        ("llama-3.1-8b", "transformer.softmax_type=learnable", "softmax_type"),
        ("llama-3.1-8b", "transformer.use_mup=true", "use_mup"),
        ("llama-3.1-8b", "transformer.activation_func=torch.nn.functional.elu", "activation_func"),
        ("llama-3.1-8b", "transformer.params_dtype=torch.float64", "params_dtype"),
        ("gpt2-124m", "transformer.window_size=[3,0]", "window_size"),
        ("deepseek-v3", "transformer.moe_router_group_topk=2", "moe_router_group_topk"),
        ("nemotron-h-8b", "transformer.layernorm_epsilon=1e-6", "layernorm_epsilon"),
        ("t5-base", "transformer.softmax_scale=null", "softmax_scale"),
        ("t5-base", "transformer.attention_dropout=0.0", "attention_dropout"),
    ],
)
def test_fields_that_config_json_cannot_express_are_refused_by_path(preset: str, override: str, path: str) -> None:
    document = Document.load(preset, ["transformer.bf16=false", override])
    with pytest.raises(DocumentError) as error:
        to_hf(document.data)
    assert f"$.transformer.{path}" in [problem.path for problem in error.value.problems]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_llama_config", True),
        ("unsloth_fixed", True),
        ("unsloth_version", "2025.1.1"),
        ("transformers.js_config", {"dtype": "q4"}),
        ("use_flashattn", True),
        ("_flash_attn_2_enabled", True),
        ("shared_expert_intermediate_size", 0),
        ("pretraining_tp", 1),
        ("residual_multiplier", 1.0),
        ("rope_interleaved", False),
        ("extra", []),
        ("layer_types", ["full_attention", "full_attention"]),
    ],
)
def test_a_field_without_effect_is_left_out_with_a_note(name: str, value: Any) -> None:
    given = {"model_type": "mixtral", "num_hidden_layers": 2}
    plain, found = from_hf(given), from_hf(given | {name: value})
    assert found.data == plain.data
    assert any(name in note and "is left out" in note for note in found.notes)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe"])
def test_a_fixed_property_of_an_architecture_may_be_stated(model_type: str) -> None:
    assert from_hf({"model_type": model_type, "use_qk_norm": True}).data == from_hf({"model_type": model_type}).data
    with pytest.raises(DocumentError, match=f"use_qk_norm: {model_type} normalises queries and keys"):
        from_hf({"model_type": model_type, "use_qk_norm": False})


def test_dtypes_may_have_the_prefix_of_torch() -> None:
    for name in ("dtype", "torch_dtype"):
        assert from_hf(LLAMA | {name: "torch.bfloat16"}).data["transformer"]["bf16"] is True


@pytest.mark.parametrize(
    ("name", "value"), [("shared_expert_intermediate_size", 8), ("pretraining_tp", 2), ("rope_interleaved", True)]
)
def test_an_unknown_field_that_may_have_an_effect_is_refused(name: str, value: Any) -> None:
    with pytest.raises(DocumentError, match=f"{name}: unknown to Bridge"):
        from_hf({"model_type": "mixtral", name: value})


def test_classifier_heads_and_long_sequences_are_noted() -> None:
    given = LLAMA | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}
    (note,) = from_hf(given).notes
    assert "has a SequenceClassification head with 3 labels instead of the output layer" in note
    (note,) = from_hf(LLAMA | {"max_position_embeddings": 131072}).notes
    assert note.startswith("seq_length is 131,072")
    assert not from_hf(LLAMA | {"architectures": ["LlamaForCausalLM"], "num_labels": 2}).notes


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"model_type": "llama", "num_key_value_heads": 3}, "$.num_key_value_heads"),
        ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 8}, "$.num_experts_per_tok"),
    ],
)
def test_a_model_that_cannot_run_is_refused_with_its_field(given: dict[str, Any], path: str) -> None:
    with pytest.raises(DocumentError) as error:
        from_hf(
            {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "num_hidden_layers": 2, **given}
        )
    assert [problem.path for problem in error.value.problems] == [path]


def test_a_language_model_inside_a_multimodal_config_is_refused() -> None:
    with pytest.raises(
        DocumentError, match=r"\$\.text_config: the language model, llama, is in this field: save the field"
    ):
        from_hf({"model_type": "llava", "text_config": LLAMA, "vision_config": {}})


def test_hints_do_not_suggest_fields_that_would_be_refused() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attn_factor": 0.878}
    with pytest.raises(DocumentError, match="attn_factor: Megatron-Core has no such factor") as refused:
        from_hf({"model_type": "qwen3", "rope_scaling": yarn})
    assert "did you mean" not in str(refused.value)
    assert from_hf({"model_type": "qwen3", "rope_scaling": yarn | {"attn_factor": 1.0}})
    with pytest.raises(DocumentError) as refused:
        from_hf(LLAMA | {"vocab_size": 9, "vocab_sizes": 8})
    assert "did you mean 'vocab_size'" not in str(refused.value)
