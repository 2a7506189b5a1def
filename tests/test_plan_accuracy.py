"""Estimates of step time against published runs: the goals, and the made files."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from example_plans import DEEP, SMALL

from bridge.dist.plan.forecast.machine import load_machine
from bridge.dist.plan.forecast.step_time import estimate_time

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".github/scripts/make_plan_accuracy.py"
ACCURACY = ROOT / "packages/bridge-dist/src/bridge/dist/plan/forecast/accuracy.yaml"


def test_the_committed_estimates_and_errors_are_those_of_the_code() -> None:
    """A process of its own plans a few of the runs, because they need Transformer Engine's layers."""
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _pool(*kinds: str, machines: set[str]) -> tuple[float, float]:
    """Return the mean and the worst error over all runs of some kinds on some machines, and print each mean."""
    table: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(ACCURACY.read_text())
    found = []
    for machine in machines & table.keys():
        for kind in {*kinds} & table[machine].keys():
            one = table[machine][kind]
            errors = f"mean {one['mean']:.1%}, worst {one['worst']:.1%}, {one['runs']} runs"
            sys.stdout.write(f"{machine}, {kind}: {errors}\n")
            found.append(one)
    runs = sum(one["runs"] for one in found)
    return sum(one["mean"] * one["runs"] for one in found) / runs, max(one["worst"] for one in found)


def test_estimates_reach_their_goals() -> None:
    """Dense bf16 by constants without the run's model; experts and FP8 on Blackwell by constants from the H100.

    On the H100, experts by constants without the run's model.
    """
    mean, worst = _pool("dense bf16", machines={"a100", "h100", "gb200"})
    assert mean <= 0.10
    assert worst <= 0.20
    for kinds in (("dense fp8",), ("MoE bf16", "MoE fp8")):
        mean, _ = _pool(*kinds, machines={"b200", "gb200", "gb300"})
        assert mean <= 0.20
    for kind in ("MoE bf16", "MoE fp8"):
        mean, worst = _pool(kind, machines={"h100"})
        assert mean <= 0.10
        assert worst <= 0.20


def test_a_fit_finds_the_constant_behind_the_times_of_steps() -> None:
    h100 = load_machine("h100")
    wanted = replace(h100, product_efficiency=0.6)
    runs = []
    for plan in (SMALL, DEEP):
        run = Mock(spec_set=["step_seconds"])  # a run has its time from a publication, and these plans have none
        run.step_seconds.return_value = estimate_time(plan, wanted).step_seconds
        runs.append((run, plan))
    found = _load_script().Fit(runs).search(h100, ["product_efficiency"], rounds=2)
    assert found.product_efficiency == pytest.approx(0.6, rel=0.01)
    assert replace(found, product_efficiency=h100.product_efficiency) == h100


def _load_script() -> ModuleType:
    spec = spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
