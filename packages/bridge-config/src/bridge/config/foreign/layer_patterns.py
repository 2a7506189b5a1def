"""Patterns of layers as text: those of hybrid models, and the lists that Megatron-LM's arguments spell by + and *."""

from __future__ import annotations

import ast
from typing import Any, cast

_MAX_PATTERN_LENGTH = 10_000
_MAX_LAYERS = 10_000


def count_layers(pattern: object) -> int | None:
    """The number of layers of a hybrid model's pattern, those of multi-token prediction aside; None if it has none."""
    return len(pattern.partition("/")[0].replace("|", "")) if isinstance(pattern, str) and pattern else None


def add_mtp_pattern(pattern: Any, predictions: Any, depths: Any) -> Any:
    """A hybrid model's pattern with that of multi-token prediction, which older versions gave apart."""
    if not isinstance(pattern, str) or not isinstance(predictions, str) or not isinstance(depths, int):
        return pattern
    is_apart = predictions and "/" not in pattern and 0 < depths < 1000
    return "/".join([pattern, *[predictions] * depths]) if is_apart else pattern


def parse_layer_pattern(text: str) -> int | list[int] | None:
    """What the parser makes of a pattern of layers, `([0]*1+[1]*3)`; None if it is none. Nothing is evaluated."""
    if len(text) > _MAX_PATTERN_LENGTH:
        return None
    try:
        found = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return found


def _evaluate(node: ast.expr) -> int | list[int]:
    """The value of a node made of whole numbers, lists of them, `list + list`, `list * number`.

    Raises:
        ValueError: it is something else, or has more layers than any model.
    """
    match node:
        case ast.Constant(value=int() as value) if type(value) is int:
            return value
        case ast.List(elts=items):
            numbers = [_evaluate(item) for item in items]
            if all(isinstance(number, int) for number in numbers):
                return cast(list[int], numbers)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = _evaluate(left), _evaluate(right)
            if isinstance(first, list) and isinstance(second, list):
                return first + second
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            part, times = _evaluate(left), _evaluate(right)
            if isinstance(part, int):
                part, times = times, part
            if isinstance(part, list) and isinstance(times, int) and len(part) * times <= _MAX_LAYERS:
                return part * times
    raise ValueError
