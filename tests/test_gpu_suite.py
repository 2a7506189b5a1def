"""The GPU suite on a machine without a GPU: rows, references, record, and a rehearsal of a row."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpu import record
from gpu.session import Row, find_error
from gpu.settings import CASES, SETTINGS, TE_STORAGE
from gpu.worker import Worker, WorkerError, WorkerTimeoutError

from bridge.config import Document
from bridge.dist.errors import LaunchError

SUITE = Path(__file__).parent / "gpu"
REFERENCES = json.loads((SUITE / "references.json").read_text())


def run_suite(record: Path, only: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run some rows as `pytest -m gpu`, where no GPU is visible."""
    settings = {"BRIDGE_GPU_ONLY": only, "BRIDGE_GPU_RECORD": str(record), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-rs", str(SUITE)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **settings, **environment}, timeout=240
    )


def test_every_case_has_a_reference_of_its_current_document() -> None:
    assert REFERENCES["training"].keys() == {*CASES, "tiny-fp16"}
    assert REFERENCES["plans"].keys() == SETTINGS.keys()
    for case, reference in REFERENCES["training"].items():
        fingerprint = Document.load(case.rpartition("-")[0]).fingerprint()
        assert reference["fingerprint"] == fingerprint, f"{case}: run tests/gpu/references.py"


def test_te_layers_are_modelled_by_the_sizes_of_the_llama() -> None:
    """Of the 1B Llama: 2,048 channels, 32 heads and 8 groups of 64, 8,192 values between two products."""
    assert REFERENCES["te_layers"].keys() == TE_STORAGE.keys()
    parameters = 2048 * (2048 + 2 * 512 + 2048 + 3 * 8192)
    bf16, tensorwise = (REFERENCES["te_layers"][storage] for storage in ("bf16", "tensorwise"))
    # Weights in bf16 and gradients in fp32; in FP8, two copies more of each weight.
    assert bf16["held"] == pytest.approx(6 * parameters, rel=1e-3)
    assert tensorwise["held"] == pytest.approx(8 * parameters, rel=1e-3)
    # For each token: inputs and outputs of two norms, queries, keys, values, the output of attention, the input of the
    # activation function and its output, and a sum of each head's scores. In FP8, the outputs of the norms and of the
    # activation function have half the bytes.
    values = 4 * 2048 + 2048 + 2 * 512 + 2048 + 3 * 8192
    assert bf16["kept"] == pytest.approx(4096 * (2 * values + 4 * 32), rel=1e-3)
    assert tensorwise["kept"] == pytest.approx(4096 * (2 * values + 4 * 32 - 2 * 2048 - 8192), rel=1e-3)


def test_functions_named_by_rows_exist() -> None:
    named = set(re.findall(r'"gpu\.(\w+):(\w+)"', "".join(file.read_text() for file in SUITE.glob("*.py"))))
    assert named
    for module, function in named:
        assert f"\ndef {function}(" in (SUITE / f"{module}.py").read_text()


def test_rows_are_deselected_by_default() -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "--collect-only", "-q", str(SUITE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "deselected" in done.stdout


def test_a_rehearsed_row_is_recorded(tmp_path: Path) -> None:
    done = run_suite(tmp_path / "gpu.json", "family:tiny-fp32,graphs-by-layer", BRIDGE_GPU_REHEARSE="1")
    assert done.returncode == 0, done.stdout
    rows = record.load(tmp_path / "gpu.json")["rows"]
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "family:tiny-fp32": record.PASSED,
        "graphs-by-layer": record.NOT_RUN,
    }
    assert rows["family:tiny-fp32"]["figures"]["loss difference"]["value"] < 1e-5
    assert rows["graphs-by-layer"]["why"] == "needs CUDA"


def test_without_a_gpu_no_row_is_run_or_recorded(tmp_path: Path) -> None:
    done = run_suite(tmp_path / "gpu.json", "family")
    assert done.returncode == 0, done.stdout
    assert "[10] " in done.stdout
    assert "no CUDA device" in done.stdout
    assert not (tmp_path / "gpu.json").exists()


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path / "worker.log")


def test_a_crash_or_hang_affects_only_its_own_row(worker: Worker, tmp_path: Path) -> None:
    first = worker.run("os:getpid", limit=30)
    with pytest.raises(WorkerError, match=r"^ValueError: "):
        worker.run("math:sqrt", -1, limit=30)
    assert worker.run("os:getpid", limit=30) == first
    with pytest.raises(WorkerError, match="died, exit code 3"):
        worker.run("os:_exit", 3, limit=30)
    second = worker.run("os:getpid", limit=30)
    assert second != first
    start = time.monotonic()
    with pytest.raises(WorkerTimeoutError, match="longer than 1 s"):
        worker.run("time:sleep", 60, limit=1)
    assert time.monotonic() - start < 20
    assert "Timeout" in (tmp_path / "worker.log").read_text()  # with the stacks at the time
    third = worker.run("os:getpid", limit=30)
    os.kill(third, signal.SIGKILL)  # while it is idle
    while Path(f"/proc/{third}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    assert worker.run("os:getpid", limit=30) not in (first, second, third)
    worker.close()


def test_a_command_that_fails_is_told_by_its_error_and_its_result_is_kept(tmp_path: Path) -> None:
    session: Any = SimpleNamespace(log=tmp_path / "gpu.log", clip_limit=lambda limit: limit)
    row = Row(session)
    with pytest.raises(RuntimeError, match=r"^bridge.dist.errors.LayoutError: 1 ranks do not fit tp x pp x cp"):
        row.bridge("build", "tiny", "--tp", "3")
    assert "Traceback (most recent call last)" in session.log.read_text()
    (tmp_path / "wrong.yaml").write_text("unknown: 1")
    (found,) = row.bridge("validate", tmp_path / "wrong.yaml")  # exit code 1, as `bridge verify` if a layout differs
    assert not found["ok"]


def test_the_error_of_a_rank_is_found_before_the_rest_of_its_message() -> None:
    error = LaunchError("rank 0: RuntimeError: no kernel image\n  File 'x.py', line 1, in f")
    error.add_note("Traceback (most recent call last):\nRuntimeError: no kernel image\nCompile with more checks.\n")
    assert find_error("".join(traceback.format_exception(error))) == "RuntimeError: no kernel image"
    assert find_error("some warning\nlast line\n") == "last line"


def test_the_page_shows_each_recorded_row_and_its_machine() -> None:
    script = Path(__file__).parents[1] / ".github/scripts/make_gpu_page.py"
    spec = importlib.util.spec_from_file_location("make_gpu_page", script)
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    machine = {"device": "NVIDIA H100 80GB HBM3", "devices": 1, "memory": 80 * 2**30, "driver": "580.1", "cuda": "13.0"}
    machine |= {
        "nccl": "2.28.9",
        "python": "3.12.3",
        "torch": "2.11.0",
        "commit": "abc",
        "packages": {"numpy": "2.5.2"},
    }
    data = record.load(Path("nowhere"))
    rows = [maker.ListedRow(f"memory:{name}", "What it holds.") for name in ("ddp", "recompute", "other")]
    assert "Never run" in maker.make_page(rows, data)
    measured = {"difference": {"value": 0.07, "at_most": 0.05}}
    record.add_row(
        data, "memory:ddp", make_row(record.FAILED, figures=measured, why="AssertionError: too much"), machine
    )
    record.add_row(data, "memory:recompute", make_row(record.PASSED), machine | {"device": "NVIDIA H200"})
    page = maker.make_page(rows, data)
    assert "Never run" not in page
    assert (
        "| date | 2026-11-27 | 2026-11-27 |\n| device | 1 x NVIDIA H100 80GB HBM3, 80 GiB | 1 x NVIDIA H200, 80" in page
    )
    assert "| memory:ddp | failed [1] | AssertionError: too much; difference 0.07 (at most 0.05) |" in page
    assert "| memory:recompute | passed [2] |  |" in page
    assert "| memory:other | not run |  |" in page


def make_row(outcome: str, **rest: object) -> record.Data:
    return {"outcome": outcome, "date": "2026-11-27", "seconds": 1.0, "figures": {}, **rest}


def test_running_some_rows_keeps_the_others() -> None:
    data = record.load(Path("nowhere"))
    first, second = {"device": "one"}, {"device": "another"}
    for name in ("a", "b", "c"):
        record.add_row(data, name, make_row(record.PASSED), first)
    record.add_row(data, "b", make_row(record.FAILED, why="too large"), second)
    record.add_row(data, "c", make_row(record.NOT_RUN, why="out of time"), second)
    assert data["runs"] == [first, second]
    assert [(each["outcome"], each["run"]) for each in data["rows"].values()] == [
        (record.PASSED, 0),
        (record.FAILED, 1),
        (record.PASSED, 0),
    ]
    for name in ("a", "c"):
        record.add_row(data, name, make_row(record.PASSED), second)
    assert data["runs"] == [second]
    assert {each["run"] for each in data["rows"].values()} == {0}
