"""The names of rows: `test_plan_memory[ddp]` is the row `plan-memory:ddp`."""

from __future__ import annotations

import pytest


def row_name(item: pytest.Item) -> str:
    """Return the name of a row by its test."""
    function, _, case = item.name.partition("[")
    name = function.removeprefix("test_").replace("_", "-")
    return f"{name}:{case.removesuffix(']')}" if case else name
