from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.builders import HookError, compose_hooks


def double(values: list[Any]) -> list[Any]:
    return [2 * value for value in values]


def add_ten(values: list[Any]) -> list[Any]:
    return [value + 10 for value in values]


def return_none(values: list[Any]) -> Any:
    values.append(0)


def test_composed_function_exposes_its_hooks() -> None:
    assert compose_hooks([double, add_ten]).hooks == (double, add_ten)  # type: ignore[attr-defined]


def test_composing_no_hooks_gives_the_identity() -> None:
    stages: list[Any] = []
    assert compose_hooks([])(stages) is stages


def test_each_hook_receives_the_previous_result() -> None:
    assert compose_hooks([double, add_ten])([5]) == [20]
    assert compose_hooks([add_ten, double])([5]) == [30]


@given(st.lists(st.sampled_from([double, add_ten])), st.lists(st.sampled_from([double, add_ten])))
def test_composition_is_associative(first: list[Any], second: list[Any]) -> None:
    in_two_steps = compose_hooks(second)(compose_hooks(first)([1]))
    assert compose_hooks(first + second)([1]) == in_two_steps


def test_none_before_the_last_hook_is_an_error_naming_the_hook() -> None:
    with pytest.raises(HookError, match=r"hook 1 of 2, .*\.return_none, returned None.*return stages"):
        compose_hooks([return_none, double])([1])


def test_none_from_the_last_hook_keeps_the_list_and_warns() -> None:
    with pytest.warns(UserWarning, match=r"hook 2 of 2, .*\.return_none, returned None.*return stages") as warned:
        assert compose_hooks([double, return_none])([1]) == [2, 0]
    assert [warning.filename for warning in warned] == [__file__]


def test_a_hook_that_returns_a_tuple_is_an_error() -> None:
    for hooks in ([tuple], [double, tuple], [tuple, double]):
        with pytest.raises(HookError, match=r"builtins\.tuple, returned a tuple: return a list"):
            compose_hooks(hooks)([1])  # type: ignore[arg-type]


def test_hooks_that_are_not_a_list_are_an_error() -> None:
    with pytest.raises(HookError, match=r"hooks must be a list, got a function: write \[.*double\]"):
        compose_hooks(double)  # type: ignore[arg-type]
    with pytest.raises(HookError, match="hooks must be a list, got None"):
        compose_hooks(None)  # type: ignore[arg-type]


def test_a_hook_that_returns_the_wrong_type_is_named() -> None:
    with pytest.raises(HookError, match=r"hook 1 of 1, builtins\.len, returned 1"):
        compose_hooks([len])([1])  # type: ignore[list-item]


def test_composing_a_hook_that_is_not_callable_is_an_error() -> None:
    with pytest.raises(HookError, match="hook 2 is 'double', which is not callable"):
        compose_hooks([double, "double"])  # type: ignore[list-item]


def test_changing_the_list_later_does_not_change_the_composed_function() -> None:
    hooks = [double]
    composed = compose_hooks(hooks)
    hooks.append(add_ten)
    assert composed([5]) == [10]
