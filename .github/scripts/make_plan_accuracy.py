#!/usr/bin/env python3
"""Hold estimates of step time against published runs, and write the results.

    make_plan_accuracy.py            fit the constants of machines, estimate every run, and write constants, estimates
                                     and their errors
    make_plan_accuracy.py --check    estimate a few runs again, and check that the errors of all are written

The runs are in tests/published_runs/. What is written: the constants in `machines.yaml` and the errors in
`accuracy.yaml` of the planner, tests/published_runs/estimates.yaml, and the tables of docs/plan-accuracy.md.
A fitted run is also estimated with constants that are fitted without the runs of its model; its error is that of this
estimate. The fit is a coordinate search: it draws nothing, so its result is always the same.

`--plans FILE` keeps the plans of the runs, which take minutes, in a file from one call to the next.
"""

from __future__ import annotations

import pickle
import re
import sys
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from bridge.dist.patch import Replacement, replace_attributes  # noqa: E402 # after the path
from bridge.dist.plan.forecast.machine import Machine, _load_table, load_machine  # noqa: E402
from bridge.dist.plan.layers import Layers, prepare_process  # noqa: E402
from bridge.dist.process.imports import import_megatron  # noqa: E402
from bridge.dist.run.devices import hide_gpus  # noqa: E402

if TYPE_CHECKING:
    from published_runs import Run

    from bridge.dist.layout import Layout
    from bridge.dist.plan.results import Plan

    Passes = Sequence[Sequence[float]]

Planned = dict[str, tuple["Run", "Plan"]]
"""Runs and their plans by the key of the run."""

FITTED = {
    "h100": ("product_efficiency", "fp8_efficiency", "attention_efficiency", "exposed", "exchange_latency"),
    "a100": ("product_efficiency",),
    "gb200": ("product_efficiency",),
}
"""The constants that are fitted to the runs of a machine; the others are those of the H100."""
SAME_CHIP = {"gb200": ("b200", "gb300")}
"""Machines that take the constants of another one with the same chip, of which they have too few runs."""
PLANNER = ROOT / "packages/bridge-dist/src/bridge/dist/plan/forecast"
ESTIMATES = ROOT / "tests/published_runs/estimates.yaml"
PAGE = ROOT / "docs/plan-accuracy.md"
MARK = "<!-- written by .github/scripts/make_plan_accuracy.py -->"
SHARE, LATENCY = (0.05, 1.0), (1e-6, 0.01)
"""The ranges of constants."""


def plan_runs(runs: Sequence[Run], file: Path | None) -> Planned:
    """Plan runs, or take their plans from a file of an earlier call."""
    from published_runs import plan_run

    kept: Planned = pickle.loads(file.read_bytes()) if file and file.exists() else {}
    planned: Planned = {}
    for run in runs:
        found = kept.get(run.key)
        if found and found[0] == run:
            planned[run.key] = found
        else:
            print(f"planning {run.key}", file=sys.stderr)
            planned[run.key] = (run, plan_run(run))
            if file:
                file.write_bytes(pickle.dumps(kept | planned))
    return planned


def estimate(plan: Plan, machine: Machine) -> float:
    """Return the estimated seconds of a step."""
    from bridge.dist.plan.forecast.step_time import estimate_time

    return estimate_time(plan, machine).step_seconds


class Fit:
    """A fit of a machine's constants to runs.

    The schedules of pipelines are simulated with the constants of the round before, because their bubbles hardly
    depend on the constants and simulating takes long.
    """

    def __init__(self, planned: Iterable[tuple[Run, Plan]]) -> None:
        self.runs = [(run, plan, run.step_seconds(plan)) for run, plan in planned]
        self._index = 0  # of the run that is estimated

    def search(
        self, machine: Machine, names: Sequence[str], *, rounds: int, steps: Sequence[float] = (0.15, 0.05, 0.02, 0.007)
    ) -> Machine:
        """Return the machine with the constants under which the mean squared logarithmic error is smallest."""
        for _ in range(rounds):
            with self._keep_bubbles():
                for step in steps:
                    machine = self._descend(machine, names, step)
        return machine

    def _descend(self, machine: Machine, names: Sequence[str], step: float) -> Machine:
        best, moved = self._loss(machine), True
        while moved:
            moved = False
            for name in names:
                low, high = LATENCY if name == "exchange_latency" else SHARE
                for factor in (1 + step, 1 / (1 + step)):
                    while True:
                        value = min(high, max(low, getattr(machine, name) * factor))
                        changed = replace(machine, **{name: value})
                        loss = self._loss(changed)
                        if loss >= best - 1e-9:
                            break
                        machine, best, moved = changed, loss, True
        return machine

    def _loss(self, machine: Machine) -> float:
        squares = 0.0
        for index, (_, plan, seconds) in enumerate(self.runs):
            self._index = index
            squares += log(estimate(plan, machine) / seconds) ** 2
        return squares / len(self.runs)

    def _keep_bubbles(self) -> AbstractContextManager[None]:
        """Return a context in which the schedule of each run is simulated once."""
        from bridge.dist.plan.forecast import step_time

        compute = step_time.compute_length
        ratios: dict[int, float] = {}

        def length(
            layout: Layout, *, forward: Passes, backward: Passes, microbatches: int, group_size: int | None
        ) -> float:
            stages = zip(forward, backward, strict=True)
            busiest = max(sum(ahead) + sum(back) for ahead, back in stages) * microbatches
            if self._index not in ratios:
                waited = compute(
                    layout, forward=forward, backward=backward, microbatches=microbatches, group_size=group_size
                )
                ratios[self._index] = waited / busiest
            return ratios[self._index] * busiest

        return replace_attributes(Replacement(step_time, "compute_length", length))


def is_fitted(run: Run) -> bool:
    """Return whether constants are fitted to a run.

    All inputs are known, and it ran on Megatron Core. On Blackwell, constants are fitted only to dense runs in bf16;
    runs with experts and in FP8 test constants from elsewhere.
    """
    is_dense_bf16 = run.precision == "bf16" and not run.experts
    return (
        run.machine in FITTED
        and not run.guessed
        and run.trainer == "megatron-core"
        and (run.machine in ("h100", "a100") or is_dense_bf16)
    )


def fit(planned: Planned) -> tuple[dict[str, Machine], dict[str, float]]:
    """Return the machines with fitted constants, and for each fitted run the estimate without its model's runs."""
    machines: dict[str, Machine] = {}
    left_out: dict[str, float] = {}
    for name, constants in FITTED.items():
        rows = [row for row in planned.values() if row[0].machine == name and is_fitted(row[0])]
        start = load_machine(name)
        if name != "h100":
            start = replace(start, **{one: getattr(machines["h100"], one) for one in FITTED["h100"]})
        machines[name] = Fit(rows).search(start, constants, rounds=2)
        for out in _group_runs([run for run, _ in rows]):
            rest = [row for row in rows if row[0].key not in out]
            machine = Fit(rest).search(machines[name], constants, rounds=1, steps=(0.05, 0.01))
            left_out |= {run.key: estimate(plan, machine) for run, plan in rows if run.key in out}
    return machines, left_out


def _group_runs(runs: Sequence[Run]) -> list[set[str]]:
    """Return groups of runs of the same model; single runs if there is only one model."""
    by_model: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for run in runs:
        by_model[(run.model, *run.overrides[:3])].add(run.key)
    groups = list(by_model.values())
    return groups if len(groups) > 1 else [{run.key} for run in runs]


def write_constants(machines: Mapping[str, Machine]) -> None:
    """Write the fitted constants into the planner's table, and keep the rest of the file."""
    path = PLANNER / "machines.yaml"
    sections = re.split(r"^(?=\w+:$)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for name, constants in FITTED.items():
        for owner in (name, *SAME_CHIP.get(name, ())):
            index = next(index for index, text in enumerate(sections) if text.startswith(f"{owner}:"))
            kept = [line for line in sections[index].splitlines() if line.strip().split(":")[0] not in constants]
            fitted = [f"  {one}: {getattr(machines[name], one):.3g}" for one in constants]
            sections[index] = "\n".join([*kept, *fitted]) + "\n"
    path.write_text("".join(sections), encoding="utf-8")
    _load_table.cache_clear()


def list_estimates(planned: Planned, left_out: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the published and the estimated seconds of every run."""
    estimates = []
    for key, (run, plan) in planned.items():
        one = {
            "run": key,
            "published": round(run.step_seconds(plan), 4),
            "estimated": round(estimate(plan, load_machine(run.machine)), 4),
        }
        if key in left_out:
            one["left_out"] = round(left_out[key], 4)
        estimates.append(one)
    return estimates


QUICK = ("GPT 22B, selective recompute", "Llama 3.1 405B, 32 GPUs, 7 layers", "Grok 1, 64 GPUs, 8 layers")
"""Runs that are planned within a second or two: on an A100 and on H100s, dense and with experts, in bf16 and FP8."""


def check_estimates(runs: Mapping[str, Run], estimates: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the committed estimates of all runs are there, and those of a few are still right."""
    committed = {one["run"]: one for one in estimates}
    if committed.keys() != runs.keys():
        print(f"{ESTIMATES} is out of date: run .github/scripts/make_plan_accuracy.py", file=sys.stderr)
        return False
    planned = plan_runs([run for run in runs.values() if run.name in QUICK], None)
    wrong = [
        f"{one['run']}: {one['estimated']} s, committed {committed[one['run']]['estimated']} s"
        for one in list_estimates(planned, {})
        if abs(one["estimated"] / committed[one["run"]]["estimated"] - 1) > 0.001
    ]
    print("".join(f"{line}: run .github/scripts/make_plan_accuracy.py\n" for line in wrong), end="", file=sys.stderr)
    return not wrong


def make_accuracy(runs: Mapping[str, Run], estimates: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the errors by machine and kind of run, without runs of other trainers and those with guessed inputs."""
    errors: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in estimates:
        run = runs[one["run"]]
        if not run.guessed and run.trainer == "megatron-core":
            errors[run.machine][run.kind].append(_error(one))
    return {
        machine: {
            kind: {"runs": len(found), "mean": round(_mean(found), 3), "worst": round(max(map(abs, found)), 3)}
            for kind, found in kinds.items()
        }
        for machine, kinds in errors.items()
    }


def _error(one: Mapping[str, Any]) -> float:
    """Return the relative error of an estimate, by constants without the run if they were fitted to it."""
    seconds: float = one.get("left_out", one["estimated"])
    return seconds / float(one["published"]) - 1


def _mean(errors: Sequence[float]) -> float:
    return sum(map(abs, errors)) / len(errors)


def make_tables(runs: Mapping[str, Run], estimates: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of the page: errors by machine and kind, and every run."""
    accuracy = make_accuracy(runs, estimates)
    lines = ["", "## By machine and kind", "", "| machine | kind | runs | constants | mean error | worst |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for machine, kinds in accuracy.items():
        for kind, found in kinds.items():
            fitted = any(
                "left_out" in one and (runs[one["run"]].machine, runs[one["run"]].kind) == (machine, kind)
                for one in estimates
            )
            origin = "fitted without the run's model" if fitted else "fitted to other runs"
            lines.append(
                f"| {machine} | {kind} | {found['runs']} | {origin} | {found['mean']:.1%} | {found['worst']:.1%} |"
            )
    titles = {
        "Runs that constants are fitted to": lambda run, one: "left_out" in one,
        "Runs that constants are not fitted to": lambda run, one: (
            "left_out" not in one and not run.guessed and run.trainer == "megatron-core"
        ),
        "Runs with guessed inputs, or of another trainer": lambda run, one: (
            bool(run.guessed) or run.trainer != "megatron-core"
        ),
    }
    for title, belongs in titles.items():
        lines += ["", f"## {title}", ""]
        lines += ["| run | machine | layout | published, s | estimated, s | error | without its model | source |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        for one in estimates:
            run = runs[one["run"]]
            if belongs(run, one):
                lines.append(_format_row(run, one))
    return "\n".join(lines) + "\n"


def _format_row(run: Run, one: Mapping[str, Any]) -> str:
    sizes = {axis: getattr(run, axis) for axis in ("tp", "pp", "vp", "cp", "ep")}
    layout = " ".join(f"{axis}{size}" for axis, size in sizes.items() if size and size > 1)
    layout = " ".join(filter(None, [f"{run.gpus} GPUs", layout, run.wrap if run.wrap != "ddp" else ""]))
    apart = f"{one['left_out'] / one['published'] - 1:+.1%}" if "left_out" in one else ""
    name = f"{run.name}; guessed: {', '.join(run.guessed)}" if run.guessed else run.name
    cells = [
        name,
        f"{run.machine}, {run.precision}",
        layout,
        f"{one['published']:.2f}",
        f"{one['estimated']:.2f}",
        f"{one['estimated'] / one['published'] - 1:+.1%}",
        apart,
        run.source,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Fit and write, or check."""
    parser = ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plans", type=Path)
    options = parser.parse_args()
    hide_gpus()
    prepare_process(Layers.TRANSFORMER_ENGINE)
    import_megatron(with_compiler=False)
    from published_runs import load_runs

    runs = {run.key: run for run in load_runs()}
    if not options.check:
        planned = plan_runs(list(runs.values()), options.plans)
        machines, left_out = fit(planned)
        write_constants(machines)
        ESTIMATES.write_text(_dump(list_estimates(planned, left_out)), encoding="utf-8")
    estimates = yaml.safe_load(ESTIMATES.read_text(encoding="utf-8"))
    if options.check and not check_estimates(runs, estimates):
        return 1
    text = PAGE.read_text(encoding="utf-8")
    made = {
        PLANNER / "accuracy.yaml": _dump(make_accuracy(runs, estimates)),
        PAGE: text[: text.index(MARK)] + MARK + "\n" + make_tables(runs, estimates),
    }
    for path, content in made.items():
        if not options.check:
            path.write_text(content, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != content:
            print(f"{path} is out of date: run .github/scripts/make_plan_accuracy.py", file=sys.stderr)
            return 1
    return 0


def _dump(data: Any) -> str:
    return f"# Written by .github/scripts/make_plan_accuracy.py\n{yaml.safe_dump(data, sort_keys=False, width=120)}"


if __name__ == "__main__":
    sys.exit(main())
