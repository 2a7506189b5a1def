import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.models.errors import ModelConfigError
from bridge.models.hybrid_pattern import check_layers, check_symbols, layers_of, staged

patterns = st.text("M*-E", min_size=1, max_size=24)


def picture(error: pytest.ExceptionInfo[ModelConfigError]) -> list[str]:
    """The lines below the first: the pattern, and arrows at what is wrong."""
    return str(error.value).splitlines()[1:]


@pytest.mark.parametrize("pattern", ["M", "M*-E", "MMMM|*-*-", "M*ME/MM/MM", "+-G"])
def test_patterns_that_are_fine(pattern: str) -> None:
    check_symbols(pattern)


@pytest.mark.parametrize(
    ("pattern", "says", "arrows"),
    [
        ("M*xM?", "symbols of no layer", "  ^ ^"),
        ("M m", "M Mamba, * attention", " ^^"),
        ("|", "no layers", "^"),
        ("M*+-D", "usual and latent attention", "  ^ ^"),
        ("MM/M/*", "repeat", "     ^"),
        ("MM/", "repeat", "   ^"),
        ("MM/M|M", "repeat", "   ^^^"),
    ],
)
def test_a_wrong_pattern_is_pictured(pattern: str, says: str, arrows: str) -> None:
    with pytest.raises(ModelConfigError, match=says.replace("*", r"\*")) as error:
        check_symbols(pattern)
    assert picture(error) == [f"  {pattern}", f"  {arrows}"]


@pytest.mark.parametrize(("num_layers", "arrows"), [(3, "    ^^"), (6, "      ^")])
def test_layers_too_many_or_too_few(num_layers: int, arrows: str) -> None:
    with pytest.raises(ModelConfigError, match=f"has 5 layers, transformer.num_layers is {num_layers}") as error:
        check_layers("M*-|M*"[:6], num_layers)
    assert picture(error) == ["  M*-|M*", f"  {arrows}"]


def test_borders_give_the_stages() -> None:
    assert staged("M|*-|E|M", 4) == "M|*-|E|M"
    assert staged("M|*-|E|M", 1) == "M*-EM"
    with pytest.raises(ModelConfigError, match="has 4 stages, the pipeline has 3") as error:
        staged("M|*-|E|M", 3)
    assert picture(error) == ["  M|*-|E|M", "  ^ ^  ^ ^"]


def test_layers_that_do_not_divide_into_stages() -> None:
    with pytest.raises(ModelConfigError, match="5 layers, which do not divide into 2 equal stages") as error:
        staged("M*-EM", 2)
    assert picture(error) == ["  M*-EM", "      ^"]


@given(patterns, st.integers(1, 4))
def test_stages_are_equal_where_nothing_is_said(pattern: str, stages: int) -> None:
    whole = pattern * stages
    parts = staged(whole + "/M", stages).removesuffix("/M").split("|")
    assert len(parts) == stages
    assert set(parts) == {pattern}
    assert layers_of("|".join(parts)) == whole
