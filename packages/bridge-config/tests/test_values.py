"""Documents with values out of range or contradictory fields are refused."""

from __future__ import annotations

import pytest

from bridge.config import Document, DocumentError

GPT = {"_target_": "bridge.models.gpt.GPTModelConfig", "vocab_size": 64}
HYBRID = {"_target_": "bridge.models.mamba.MambaModelConfig", "vocab_size": 64}
SIZES = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}


def problems(model: dict[str, object], **transformer: object) -> list[tuple[str, str]]:
    with pytest.raises(DocumentError) as error:
        Document(GPT | model | {"transformer": SIZES | transformer}).check()
    return sorted((problem.path, problem.message) for problem in error.value.problems)


def test_all_values_out_of_range_are_reported_together() -> None:
    assert problems({"vocab_size": 0}, num_layers=-1, hidden_dropout=1.5) == [
        ("$.transformer.hidden_dropout", "must be between 0 and 1, got 1.5"),
        ("$.transformer.num_layers", "must be at least 1, got -1"),
        ("$.vocab_size", "must be at least 1, got 0"),
    ]


def test_a_value_of_the_wrong_type_is_reported_once() -> None:
    assert problems({}, num_layers=0.5) == [("$.transformer.num_layers", "expected an integer, got 0.5")]


def test_missing_sizes_are_reported() -> None:
    with pytest.raises(DocumentError, match=r"\$\.transformer\.num_layers: required, but missing"):
        Document(GPT | {"transformer": {"hidden_size": 64, "num_attention_heads": 4}}).check()


def test_contradictory_fields_are_reported() -> None:
    assert problems({"position_embedding_type": "rope"}, kv_channels=15) == [
        ("$.transformer.kv_channels", "must be even, got 15: channels are rotated in pairs")
    ]
    assert problems({}, num_query_groups=3)[0][0] == "$.transformer.num_query_groups"
    # An explicit kv_channels may have any value; a derived one is rounded down, which would lose channels.
    Document(GPT | {"transformer": SIZES | {"hidden_size": 100, "num_attention_heads": 3, "kv_channels": 33}}).check()
    assert "must divide hidden_size = 100, got 3" in problems({}, hidden_size=100, num_attention_heads=3)[0][1]


def test_a_size_too_large_for_a_float_is_compared_with_others() -> None:
    model = {"position_embedding_type": "rope", "rotary_percent": 0.5}
    Document(GPT | model | {"transformer": SIZES | {"kv_channels": 10**400}}).check()
    assert problems(model | {"rotary_percent": 1.0}, kv_channels=10**400 + 1)[0][0] == "$.transformer.kv_channels"


def test_hybrid_layers_without_a_pattern_are_bounded() -> None:
    assert problems(HYBRID, num_layers=10**30, is_hybrid_model=True) == [
        ("$.transformer.num_layers", f"must be at most 10000 without hybrid_layer_pattern, got {10**30}")
    ]
