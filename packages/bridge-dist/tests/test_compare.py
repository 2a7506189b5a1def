"""Comparison of build reports and plans: numbers, notes, and invalid files."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from parsed_page import StrictParser, read_columns, read_data, rows
from rich.console import Console

from bridge.config import DocumentError
from bridge.config.cli.entry import main
from bridge.dist.run.compare import Comparison, compare, render_comparison
from bridge.dist.run.comparison_page import render_comparison_page

GIB = 2**30
LAYOUT = {"tp": 2, "pp": 2, "vp": 1, "cp": 1, "ep": 1, "etp": 2, "dp": 1}
JOB = {
    "world_size": 4,
    "layout": LAYOUT,
    "wrap": "ddp",
    "distributed_optimizer": False,
    "layers": "pytorch",
    "seq_length": 4096,
    "micro_batch_size": 1,
    "global_batch_size": 8,
    "parameters": 1_000_000,
}


def stage(pp: int, *gib: int) -> dict[str, int]:
    kinds = ("weight", "gradient", "master", "state", "activation", "unsharded")
    sizes = {f"{kind}_bytes": size * GIB for kind, size in zip(kinds, gib, strict=True)}
    return {"pp": pp, **sizes, "total_bytes": sum(gib) * GIB}


def rank(pp: int, allocated: float | None) -> dict[str, Any]:
    reserved = None if allocated is None else int((allocated + 2) * GIB)
    peak = {"allocated": None if allocated is None else int(allocated * GIB), "reserved": reserved, "resident": GIB}
    return {"pp": pp, "peak_memory_bytes": peak}


PLAN = {
    "kind": "plan",
    **JOB,
    "stages": [stage(0, 4, 8, 2, 4, 2, 0), stage(1, 4, 8, 0, 8, 5, 0)],
    "time": {"machine": "h100", "step_seconds": 0.4, "tokens_per_second_per_gpu": 20_480.0},
}  # 20 and 25 GiB in total
ON_GPUS = {
    "kind": "build",
    **JOB,
    "device": "cuda",
    "device_name": "NVIDIA H100 80GB HBM3",
    "ranks": [rank(0, 20.5), rank(0, 20.5), rank(1, 26), rank(1, 25.5)],
    "step_seconds": 0.5,
    "tokens_per_second_per_gpu": 16_384.0,
    "model_flops_utilization": 0.4,
}
FASTER = {**ON_GPUS, "step_seconds": 0.4, "tokens_per_second_per_gpu": 20_480.0, "model_flops_utilization": 0.5}
ON_THE_CPU = {**ON_GPUS, "device": "cpu", "device_name": None, "ranks": [rank(0, None)], "layout": LAYOUT | {"pp": 1}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compare_files(**files: dict[str, Any]) -> Comparison:
    for name, data in files.items():
        Path(f"{name}.json").write_text(json.dumps(data))
    return compare([f"{name}.json" for name in files])


def render(comparison: Comparison) -> str:
    console = Console(file=io.StringIO(), width=80)
    for part in render_comparison(comparison):
        console.print(part)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.usefixtures("folder")
def test_a_run_is_compared_with_its_plan() -> None:
    found = compare_files(plan=PLAN, run=ON_GPUS)
    rows = {row.name: (row.values, row.differences) for row in found.rows}
    # The largest stage of the plan is stage 1 with 25 GiB; the largest rank is in that stage, and 26 / 25 = 1.04.
    assert rows["stage"][0] == [1, 1]
    assert rows["peak"] == ([25 * GIB, 26 * GIB], [None, pytest.approx(4.0)])
    kinds = {"weights": 4, "gradients": 8, "master": 0, "state": 8, "activations": 5, "unsharded": 0}
    assert {kind: rows[kind][0] for kind in kinds} == {kind: [size * GIB, None] for kind, size in kinds.items()}
    assert rows["reserved"] == ([None, 28 * GIB], [None, None])
    assert rows["parameters"] == ([1_000_000, 1_000_000], [None, 0.0])
    assert rows["layout"][0] == ["tp2 pp2", "tp2 pp2"]
    assert rows["step_seconds"] == ([0.4, 0.5], [None, pytest.approx(25.0)])
    assert rows["model_flops_utilization"] == ([None, 0.4], [None, None])
    assert rows["machine"][0] == ["h100", None]
    assert len(found.notes) == 1
    assert found.notes[0].startswith("not included in a plan's total: the CUDA context")
    assert found.as_dict()["kind"] == "comparison"


@pytest.mark.usefixtures("folder")
def test_every_later_file_is_compared_with_the_first() -> None:
    found = compare_files(run=ON_GPUS, faster=FASTER, cpu=ON_THE_CPU)
    rows = {row.name: row.differences for row in found.rows}
    assert rows["step_seconds"] == [None, pytest.approx(-20.0), 0.0]
    assert rows["tokens_per_second_per_gpu"] == [None, pytest.approx(25.0), 0.0]
    assert rows["model_flops_utilization"] == [None, pytest.approx(25.0), 0.0]
    assert rows["peak"] == [None, 0.0, None]
    assert found.notes[0] == "not the same job: they differ in layout"
    assert found.notes[1].startswith("resident memory includes the interpreter and libraries: it cannot be compared")
    untrained = compare_files(run=ON_GPUS, untrained=ON_GPUS | {"seq_length": None})
    assert untrained.notes == ["untrained.json trained no step: its memory covers the build only"]


@pytest.mark.usefixtures("folder")
def test_the_table_fits_80_columns() -> None:
    text = render(compare_files(**{"a run of Tuesday night": ON_GPUS, "faster": FASTER, "plan": PLAN}))
    assert "…" not in text
    rows = [line.split("  ") for line in text.splitlines()]
    cells = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert cells["step, s"] == ["0.500", "0.400 -20.0 %", "0.400 -20.0 %"]
    assert cells["total or allocated, GiB"] == ["26.000", "26.000 +0.0 %", "25.000 -3.8 %"]
    assert cells["model-FLOPs utilisation"] == ["40.0%", "50.0% +25.0 %", "-"]
    assert cells["batch"] == ["8 x 4,096"] * 3


@pytest.mark.usefixtures("folder")
def test_files_from_before_the_strategies_have_the_default_one() -> None:
    before = ON_GPUS | {"wrap": "megatron-fsdp"}
    found = compare_files(before=before, now=before | {"sharding_strategy": "optim"}, other=ON_GPUS)
    rows = {row.name: row.values for row in found.rows}
    assert rows["wrapper"] == ["megatron-fsdp optim_grads_params", "megatron-fsdp optim", "ddp"]


WRONG = {
    "no file": (None, "no file.json: no such file"),
    "torn": ('{"kind": "build"', "torn.json: is not JSON (Expecting ',' delimiter: line 1 column 17"),
    "deep": ("[" * 100_000, "deep.json: is not JSON (maximum recursion depth exceeded"),
    "list": (
        "[]",
        "list.json: has no kind, so it is neither a build report nor a plan: write one with bridge build",
    ),
    "document": ('{"_target_": "a.b"}', "document.json: has no kind"),
    "kind": ('{"kind": 3}', "kind.json: $.kind: expected a string, got 3"),
    "search": ('{"kind": "search"}', "search.json: $.kind: expected a build report or a plan, got 'search'"),
    "empty": ('{"kind": "build"}', "empty.json: $.layout: is missing: create the file again with this version"),
    "size": (PLAN | {"world_size": "4"}, "size.json: $.world_size: expected an integer, got '4'"),
    "flag": (PLAN | {"world_size": True}, "flag.json: $.world_size: expected an integer, got true"),
    "huge": (PLAN | {"parameters": 10**400}, "huge.json: $.parameters: expected a number below 1e+30, got 1"),
    "nan": (PLAN | {"parameters": float("nan")}, "nan.json: $.parameters: expected a number below 1e+30, got nan"),
    "no stages": (PLAN | {"stages": []}, "no stages.json: $.stages: is empty"),
    "stage": (PLAN | {"stages": [3]}, "stage.json: $.stages[0]: expected a mapping, got 3"),
    "bytes": (PLAN | {"stages": [{"pp": 0, "total_bytes": 1}]}, "bytes.json: $.stages[0].weight_bytes: is missing"),
    "peak": (ON_GPUS | {"ranks": [{"pp": 0}]}, "peak.json: $.ranks[0].peak_memory_bytes: is missing"),
    "device": (ON_GPUS | {"device": None, "device_name": None}, "device.json: $.device: is missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_neither_reports_nor_plans_are_refused(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, says = WRONG[name]
    (folder / "plan.json").write_text(json.dumps(PLAN))
    if content is not None:
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SystemExit) as ended:
        main(["compare", "plan.json", f"{name}.json"])
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(says)
    assert err.count("\n") == 1


@pytest.mark.usefixtures("folder")
def test_a_single_plan_is_an_error() -> None:
    with pytest.raises(DocumentError, match=r"plan\.json: \$\.kind: a single plan cannot be compared"):
        compare_files(plan=PLAN)


def test_the_command_without_files_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare"])
    assert ended.value.code == 2
    assert "Missing argument 'FILE...'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["compare", "-", "-"], 2, "standard input (-) can be read only once"),
        (["compare", "plan.json", "--html", "missing/page.html"], 1, "there is no folder "),
        (["plan", "tiny", "--html", "missing/page.html"], 1, "there is no folder "),
        (["plan", "tiny", "--html", f"{'a' * 300}.html"], 1, "cannot be written: File name too long"),
        (["search", "tiny", "--gpus", "2", "-o", "missing/fastest.yaml"], 1, "there is no folder "),
        (["plan", "tiny", "--tokens", "15T", "--price", "nan"], 2, "'nan' is not a price"),
        (["plan", "tiny", "--tokens", "15T", "--price", "inf"], 2, "'inf' is not a price"),
        (["plan", "tiny", "--tokens", "0.4"], 2, "'0.4' is not a number of tokens"),
        (["plan", "tiny", "--tokens", "9" * 400], 2, "is not a number of tokens"),
        (["plan", "tiny", "--gpu-memory", "0.1B"], 2, "'0.1B' is not a memory size"),
        (["plan", "tiny", "--reserve", "9" * 400 + "GiB"], 2, "is not a memory size"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code
    assert says in capsys.readouterr().err


HOSTILE = "</title><script>alert(1)</script>"


def plan_with_page(gib: int, *, command: str = "bridge plan tiny") -> dict[str, Any]:
    """Return a plan with all that the page shows: two stages, the first with so many GiB of activations."""
    traffic = [{"group": "tp", "ranks": 2, "operation": HOSTILE, "calls": 1, "bytes": gib * GIB}]
    stages = [stage(0, 4, 8, 2, 4, gib, 0), stage(1, 4, 8, 2, 4, 5, 0)]
    return PLAN | {
        "stages": [one | {"optimizer_bytes": 6 * GIB, "traffic": traffic} for one in stages],
        "reserve_bytes": 4 * GIB,
        "gpu_memory": 30 * GIB,
        "time": {"step_seconds": gib / 10, "parts": {"attention": gib / 10}},
        "command": command,
    }


@pytest.mark.usefixtures("folder")
def test_a_page_shows_plans_side_by_side_and_runs_in_the_table() -> None:
    found = compare_files(
        **{"a": plan_with_page(2), HOSTILE.replace("/", ""): plan_with_page(9, command=HOSTILE), "run": ON_GPUS}
    )
    text = render_comparison_page(found)
    assert len(text.encode()) < 2_000_000
    page = StrictParser(text).root
    assert len(page.all("script")) == 3
    banners = [" ".join(one.text.split()) for one in page.all("p", class_="banner")]
    assert banners == [
        "Fits. 3.000 GiB are left: stage 1 needs the most, 23.000 and the reserve of 4.000 of 30.000 GiB",
        "Does not fit. 1.000 GiB too much: stage 0 needs the most, 27.000 and the reserve of 4.000 of 30.000 GiB; "
        "1 of 2 stages do not fit",
        "A run: its numbers are measured.",
    ]
    charts = [f"{name}-{index}" for name in ("memory", "time", "traffic") for index in (0, 1)]
    assert list(read_data(page)["charts"]) == charts
    assert read_columns(page, "memory-1", "memory-1")["activations"] == [9, 5]
    assert read_columns(page, "memory-1", "memory-1")["reserve"] == [4, 4]
    assert read_columns(page, "time-1", "time-1")["label"] == ["0.900 s, 100.0%"]
    step = next(row for row in rows(page.one("table", id="table-measures")) if row[""] == "step, s")
    assert list(step.values()) == ["step, s", "0.200", "0.900 +350.0 %", "0.500 +150.0 %"]
    assert [one.text for one in page.all("pre")] == ["bridge plan tiny", HOSTILE]


def test_files_are_compared_without_torch(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps(ON_GPUS))
    (folder / "with_page.json").write_text(json.dumps(plan_with_page(2)))
    check = (
        "import sys; from bridge.config.cli.entry import main\n"
        "try: main(['compare', 'with_page.json', 'run.json', '--html', 'page.html', '--json'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'megatron', 'megatron.core'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == ["with_page.json", "run.json"]
    assert "Comparison of 2 files" in (folder / "page.html").read_text(encoding="utf-8")
