"""Layer patterns as text: those of hybrid models, and lists in Megatron-LM's arguments such as `([0]*1+[1]*3)`."""

from __future__ import annotations

import ast
from typing import Any, cast

from bridge.config.schema.hybrid_pattern import get_layers

_MAX_PATTERN_LENGTH = 10_000
_MAX_LAYERS = 10_000


def count_layers(pattern: object) -> int | None:
    """Return the number of layers in a hybrid pattern, without multi-token prediction; None without a pattern."""
    return len(get_layers(pattern)) if isinstance(pattern, str) and pattern else None


def add_mtp_pattern(pattern: Any, predictions: Any, depths: Any) -> Any:
    """Append the pattern of multi-token prediction, which older versions kept in a separate field."""
    if not isinstance(pattern, str) or not isinstance(predictions, str) or not isinstance(depths, int):
        return pattern
    # The bound keeps a bad file from exhausting memory.
    is_apart = predictions and "/" not in pattern and 0 < depths < 1000
    return "/".join([pattern, *[predictions] * depths]) if is_apart else pattern


def parse_layer_pattern(text: str) -> int | list[int] | None:
    """Parse a pattern such as `([0]*1+[1]*3)` as Megatron-LM does, but without `eval`; None if it is not one."""
    if len(text) > _MAX_PATTERN_LENGTH:
        return None
    try:
        found = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return found


def _evaluate(node: ast.expr) -> int | list[int]:
    """Evaluate integers, lists of integers, `list + list` and `list * integer`.

    Raises:
        ValueError: the node is something else, or the list is too long.
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
            if isinstance(first, list) and isinstance(second, list) and len(first) + len(second) <= _MAX_LAYERS:
                return first + second
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            part, times = _evaluate(left), _evaluate(right)
            if isinstance(part, int):
                part, times = times, part
            if isinstance(part, list) and isinstance(times, int) and len(part) * times <= _MAX_LAYERS:
                return part * times
    raise ValueError
