"""Padded vocabulary sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.models.common.vocab import pad_vocab_size
from bridge.models.errors import ModelConfigError


# Computed by hand: 32000 = 250 x 128; 50257 + 47 = 50304 = 393 x 128; 50257 + 943 = 51200 = 50 x 1024.
@pytest.mark.parametrize(
    ("vocab", "divisible_by", "tp", "padded"),
    [
        (32000, 128, 1, 32000),
        (50257, 128, 1, 50304),
        (50257, 128, 8, 51200),
        (1, 128, 4, 512),
        (7, 1, 1, 7),
        (7, 1, 2, 8),
    ],
)
def test_padded_sizes_match_hand_computed_values(vocab: int, divisible_by: int, tp: int, padded: int) -> None:
    assert pad_vocab_size(vocab, make_vocab_size_divisible_by=divisible_by, tensor_model_parallel_size=tp) == padded


@given(st.integers(1, 10**9), st.integers(1, 4096), st.integers(1, 64))
def test_padding_gives_the_smallest_divisible_size(vocab: int, divisible_by: int, tp: int) -> None:
    padded = pad_vocab_size(vocab, make_vocab_size_divisible_by=divisible_by, tensor_model_parallel_size=tp)
    assert padded % tp == 0
    assert padded // tp % divisible_by == 0
    assert 0 <= padded - vocab < divisible_by * tp


@pytest.mark.parametrize(("vocab", "divisible_by", "tp"), [(0, 128, 1), (-5, 128, 1), (5, 0, 1), (5, 128, 0)])
def test_sizes_below_one_are_refused(vocab: int, divisible_by: int, tp: int) -> None:
    with pytest.raises(ModelConfigError, match="must be at least 1, got"):
        pad_vocab_size(vocab, make_vocab_size_divisible_by=divisible_by, tensor_model_parallel_size=tp)
