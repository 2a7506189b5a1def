"""Hybrid layer patterns: symbols, errors and pipeline stages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from bridge.config.schema import hybrid_pattern
from bridge.config.schema.hybrid_pattern import find_problem, get_layers
from bridge.models.errors import ModelConfigError
from bridge.models.mamba.pattern import split_pattern

patterns = st.text("M*-E", min_size=1, max_size=24)


def marked_pattern(text: object) -> list[str]:
    """Return the lines after the first: the pattern, and arrows below its invalid symbols."""
    return str(text).splitlines()[1:]


def test_symbols_match_megatron() -> None:
    assert set(hybrid_pattern.MEANINGS) == Symbols.VALID_LAYERS
    assert (hybrid_pattern.STAGE, hybrid_pattern.PREDICTION) == (Symbols.PIPE, Symbols.MTP_SEPARATOR)
    assert (hybrid_pattern.MAMBA, hybrid_pattern.EXPERTS) == (Symbols.MAMBA, Symbols.MOE)
    assert (hybrid_pattern.LATENT_ATTENTION, hybrid_pattern.SPARSE_ATTENTION) == (Symbols.MLA, Symbols.DS_ATTENTION)


@pytest.mark.parametrize("pattern", ["M", "M*-E", "MMMM|*-*-", "M*ME/MM/MM", "+-G"])
def test_valid_patterns_are_accepted(pattern: str) -> None:
    assert find_problem(pattern, len(get_layers(pattern))) is None


@pytest.mark.parametrize(
    ("pattern", "says", "arrows"),
    [
        ("M*xM?", "unknown symbols", "  ^ ^"),
        ("M m", "M Mamba, * attention", " ^^"),
        ("", "no layers", "^"),
        ("|", "no layers", "^"),
        ("M*+-D", "plain and latent attention", "  ^ ^"),
        ("MM/M/*", "repeat", "     ^"),
        ("MM/", "repeat", "   ^"),
        ("MM/M|M", "repeat", "   ^^^"),
    ],
)
def test_errors_mark_the_invalid_part_of_a_pattern(pattern: str, says: str, arrows: str) -> None:
    said = find_problem(pattern, 2)
    assert said is not None
    assert says in said
    assert marked_pattern(said) == [f"  {pattern}", f"  {arrows}"]


def test_a_pattern_too_long_to_show_is_refused() -> None:
    assert find_problem("M" * 10_000, 10_000) is None
    assert find_problem("M" * 3_000_000, 3_000_000) == "must have at most 10000 symbols, got 3000000"


@pytest.mark.parametrize(("num_layers", "arrows"), [(3, "    ^^"), (6, "      ^")])
def test_a_wrong_number_of_layers_is_refused(num_layers: int, arrows: str) -> None:
    said = find_problem("M*-|M*", num_layers)
    assert said is not None
    assert f"has 5 layers, but transformer.num_layers = {num_layers}" in said
    assert marked_pattern(said) == ["  M*-|M*", f"  {arrows}"]


def test_separators_give_the_stages() -> None:
    assert split_pattern("M|*-|E|M", 4) == "M|*-|E|M"
    assert split_pattern("M|*-|E|M", 1) == "M*-EM"
    with pytest.raises(ModelConfigError, match="has 4 stages, the pipeline has 3") as error:
        split_pattern("M|*-|E|M", 3)
    assert marked_pattern(error.value) == ["  M|*-|E|M", "  ^ ^  ^ ^"]


def test_layers_that_do_not_divide_into_stages_are_refused() -> None:
    with pytest.raises(ModelConfigError, match="5 layers, which do not divide into 2 equal stages") as error:
        split_pattern("M*-EM", 2)
    assert marked_pattern(error.value) == ["  M*-EM", "      ^"]


@given(patterns, st.integers(1, 4))
def test_stages_are_equal_without_separators(pattern: str, stages: int) -> None:
    whole = pattern * stages
    parts = split_pattern(whole + "/M", stages).removesuffix("/M").split("|")
    assert len(parts) == stages
    assert set(parts) == {pattern}
    assert get_layers("|".join(parts)) == whole
