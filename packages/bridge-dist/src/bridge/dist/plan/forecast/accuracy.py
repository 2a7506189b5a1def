"""How far estimates are from published runs, by machine and kind of job."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from bridge.config.text.parse import parse_yaml
from bridge.dist.plan.forecast.machine import Machine
from bridge.dist.plan.results import Plan


def describe_accuracy(plan: Plan, machine: Machine) -> str:
    """Return how far estimates are from published runs of the same kind on the machine."""
    dtypes = plan.product_dtypes
    precision = "fp8" if "float8" in dtypes else "bf16" if "bfloat16" in dtypes else "other"
    kind = f"{'MoE' if plan.has_experts else 'dense'} {precision}"
    found = _load_table().get(machine.name, {}).get(kind)
    if found is None:
        return "not validated"
    runs = "published run" if found["runs"] == 1 else f"{found['runs']} published runs"
    worst = "" if found["runs"] == 1 else f", {found['worst']:.0%} at worst"
    return f"\u00b1{found['mean']:.0%} on {runs} ({kind}){worst}"


@cache
def _load_table() -> dict[str, Any]:
    """Return the errors by machine and kind, see ``.github/scripts/make_plan_accuracy.py``."""
    text = files(__package__).joinpath("accuracy.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = parse_yaml(text, "accuracy.yaml").data
    return table
