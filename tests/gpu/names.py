"""Names of rows: `test_plan_memory[ddp]` is the row `plan-memory:ddp`."""

from __future__ import annotations

import pytest


def get_row_name(item: pytest.Item) -> str:
    """Return the name of the row that a test runs."""
    function, _, case = item.name.partition("[")
    name = function.removeprefix("test_").replace("_", "-")
    return f"{name}:{case.removesuffix(']')}" if case else name
