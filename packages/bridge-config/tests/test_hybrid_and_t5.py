"""Hybrid and T5 models of megatron.training and Megatron Bridge are converted to Bridge documents."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.config.foreign.recognize import convert_foreign

CORE = "megatron.core.transformer.transformer_config"
HYBRID = "megatron.training.models.hybrid.HybridModelConfig"
HYBRID_PROVIDER = "megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider"
T5_PROVIDER = "megatron.bridge.models.t5_provider.T5ModelProvider"
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
def test_hybrid_fields_are_renamed(name: str, builder: str) -> None:
    result = convert_foreign({"model": hybrid(name, _builder_=builder, vocab_size=64, hybrid_mlp_ratio=0.0)})
    assert result.data == {
        "_target_": "bridge.models.mamba.MambaModelConfig",
        "_builder_": "bridge.models.mamba.MambaModelBuilder",
        "transformer": {"_target_": f"{CORE}.TransformerConfig", "num_layers": 2, "activation_func": "squared_relu"},
        "hybrid_stack_spec": None,
        "hybrid_layer_pattern": "M*",
        "vocab_size": 64,
    }
    assert result.notes == ["left out, disabled and unknown to Bridge: hybrid_mlp_ratio"]
    assert not result.problems


def test_older_hybrid_fields_are_renamed() -> None:
    data = hybrid(hybrid_override_pattern="M-", mamba_stack_spec=None)
    del data["hybrid_layer_pattern"], data["hybrid_stack_spec"]
    result = convert_foreign(data)
    assert result.data["hybrid_layer_pattern"] == "M-"
    assert dict(result.moves)[("hybrid_layer_pattern",)] == ("hybrid_override_pattern",)
    same = convert_foreign(hybrid(hybrid_override_pattern="M*"))
    assert same.data["hybrid_layer_pattern"] == "M*"
    assert same.notes == ["left out, an old name of a field that is also given: hybrid_override_pattern"]
    both = convert_foreign(hybrid(hybrid_override_pattern="M-"))
    assert [path for path, _ in both.problems] == [("hybrid_override_pattern",)]
    ratio = convert_foreign(hybrid(hybrid_attention_ratio=0.5))
    assert [path for path, _ in ratio.problems] == [("hybrid_attention_ratio",)]


def test_a_hybrid_provider_is_split_into_model_and_transformer() -> None:
    name = "megatron.bridge.models.hybrid.hybrid_provider.get_default_hybrid_stack_spec"
    spec = {"_target_": name, "_call_": False}
    result = convert_foreign(
        {"model": flat_hybrid(num_layers=2, vocab_size=64, hybrid_stack_spec=spec, mtp_num_layers=0)}
    )
    assert result.data["hybrid_stack_spec"] == "bridge.models.hybrid_layers.default_stack_spec"
    assert result.data["vocab_size"] == 64
    assert result.data["transformer"]["num_layers"] == 2
    assert result.data["transformer"]["mtp_num_layers"] is None
    assert dict(result.moves)["transformer", "num_layers"] == ("model", "num_layers")
    assert not result.notes + result.problems


def test_the_defaults_of_a_hybrid_provider_are_written_out() -> None:
    result = convert_foreign({"_target_": HYBRID_PROVIDER, "hybrid_layer_pattern": "MM*", "activation_func": "silu"})
    assert result.data["transformer"]["bf16"] is True
    assert result.data["transformer"]["normalization"] == "RMSNorm"
    assert result.data["transformer"]["num_layers"] == 3
    assert "$.bf16: set to True, the default of HybridModelProvider" in result.notes
    assert "transformer.num_layers: set to 3, the number of layers in hybrid_layer_pattern" in result.notes


def test_defaults_of_a_provider_subclass_are_noted() -> None:
    name = "megatron.bridge.models.nemotronh.nemotron_h_provider.NemotronHModelProvider8B"
    *_, told, _ = convert_foreign({"_target_": name, "hidden_size": 4096, "activation_func": "relu2"}).notes
    assert told.startswith("Bridge's defaults are used, which may differ from those of NemotronHModelProvider8B: ")
    assert ", ffn_hidden_size," in told
    assert ", hidden_size," not in told
    assert " and 2" in told  # and some two hundred more
    assert len(told) < 700


def test_multi_token_prediction_is_joined_to_the_pattern() -> None:
    data = hybrid(transformer={"mtp_num_layers": 2}, mtp_hybrid_override_pattern="*E", keep_mtp_spec_in_bf16=False)
    result = convert_foreign(data)
    assert result.data["hybrid_layer_pattern"] == "M*/*E/*E"
    assert not result.problems
    assert result.notes == [
        "hybrid_layer_pattern: set to 'M*/*E/*E', which includes mtp_hybrid_override_pattern",
        "left out, disabled and unknown to Bridge: keep_mtp_spec_in_bf16",
    ]
    unified = convert_foreign(hybrid(hybrid_layer_pattern="M*/*E", mtp_hybrid_override_pattern="*E"))
    assert unified.data["hybrid_layer_pattern"] == "M*/*E"
    assert unified.notes == ["left out, no effect on the model: mtp_hybrid_override_pattern"]


def test_multi_token_prediction_layers_are_left_out_only_if_default() -> None:
    name = "megatron.bridge.models.mamba.mamba_provider.get_default_mamba_stack_spec"
    usual = convert_foreign(hybrid(mtp_mamba_stack_spec={"_target_": name, "_call_": False}))
    assert usual.notes == ["left out, the same as the default: mtp_mamba_stack_spec"]
    other = convert_foreign(hybrid(mtp_mamba_stack_spec={"_target_": "my.spec", "_call_": False}))
    assert [path for path, _ in other.problems] == [("mtp_mamba_stack_spec",)]


def test_a_missing_pattern_is_noted() -> None:
    assert "the document has no hybrid_layer_pattern: only Mamba layers are assumed" in (
        convert_foreign(hybrid(hybrid_layer_pattern=None)).notes
    )


def test_the_activation_function_is_read_from_the_metadata() -> None:
    data = hybrid(extra_checkpoint_metadata={"megatron_bridge.activation_func": "relu2"})
    del data["transformer"]["activation_func"]
    result = convert_foreign(data)
    assert result.data["transformer"]["activation_func"] == "squared_relu"
    assert result.notes == ["transformer.activation_func: relu2 taken from extra_checkpoint_metadata"]


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
    result = convert_foreign(
        {"_target_": T5_PROVIDER, **T5_KNOWN, **sizes, "seq_length_dec": 128, "transformer_layer_spec": spec}
    )
    assert result.data["_target_"] == "bridge.models.t5.T5ModelConfig"
    assert (result.data["seq_length"], result.data["encoder_num_layers"]) == (512, 3)
    assert result.data["transformer"]["num_layers"] == 2
    assert "transformer_layer_spec" not in result.data
    assert not result.problems
    assert result.notes == [
        "$.transformer_layer_spec: left to the default, with transformer_impl transformer_engine",
        "left out, disabled and unknown to Bridge: encoder_pipeline_model_parallel_size",
        "left out, no effect on the model: seq_length, seq_length_dec",
    ]
    other = convert_foreign(
        {"_target_": T5_PROVIDER, **T5_KNOWN, **sizes, "encoder_pipeline_model_parallel_size": 2, "typo": 1}
    )
    assert [path for path, _ in other.problems] == [("encoder_pipeline_model_parallel_size",), ("typo",)]
