"""`bridge verify` finds layouts that train differently from one process, for any builder."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from environments import run_command

from bridge.dist.run.parity import TrainingResult
from bridge.dist.run.splits import list_cases
from bridge.dist.run.verify import Row, Tolerance, Verdict, compute_relative_difference, judge

BRIDGE = Path(sys.executable).with_name("bridge")
EXTENSION = Path(__file__).parent / "typing" / "extension"
SHORT = ("--steps", "3", "--seq-length", "16", "--global-batch-size", "4")

SKEWED_HOOK = """
from megatron.core import parallel_state

def skew(stages):
    more = parallel_state.get_tensor_model_parallel_world_size() - 1
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if "final_layernorm" in name:
                parameter.data += 0.1 * more
    return stages
"""


def verify(*args: str | Path, path: Path | None = None) -> tuple[int, list[dict[str, Any]], str]:
    """Run the command; return its exit code, its rows and its other output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if path is None else {"PYTHONPATH": str(path)})
    done = subprocess.run(
        [BRIDGE, "verify", *args, "--json"], capture_output=True, text=True, check=False, env=environment, timeout=600
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else [], done.stderr


def declare(folder: Path, name: str, targets: dict[str, str]) -> None:
    """Write metadata of a distribution into a folder on the path, which declares names for documents."""
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{target} = {value}" for target, value in targets.items()]
    (information / "entry_points.txt").write_text("\n".join(["[bridge.targets]", *lines]))


def test_every_layout_of_a_correct_model_is_equal_or_refused() -> None:
    """The cells of tiny on two processes in docs/matrix.md."""
    sizes = (*SHORT, "--steps", "5", "--micro-batch-size", "2")
    code, out, errors = run_command("verify", "tiny", "--nproc", "2", *sizes, "--json")
    assert code == 0, errors
    rows = json.loads(out)
    assert [(row["layout"], row["wrapper"]) for row in rows] == [
        (split.format_name(2), str(wrapping)) for split, wrapping in list_cases(2)
    ]
    verdicts = [row["verdict"] for row in rows]
    assert set(verdicts) == {"equal", "refused"}
    assert verdicts.count("equal") > len(rows) / 2
    for row in rows:
        if row["verdict"] == "equal":
            assert row["loss_difference"] < 1e-5
            assert row["weight_difference"] < 1e-3
        else:
            assert row["reason"]


def test_a_layout_that_trains_incorrectly_is_a_mismatch(tmp_path: Path) -> None:
    (tmp_path / "skewed.py").write_text(SKEWED_HOOK)
    declare(tmp_path, "skewed", {"skewed.skew": "skewed:skew"})
    layouts = ("--nproc", "2", "--only", "dp2 with ddp,tp2 with ddp")
    code, rows, errors = verify("tiny", "pre_wrap_hooks=[skewed.skew]", *layouts, *SHORT, path=tmp_path)
    assert code == 1, errors
    verdicts = {(row["layout"], row["wrapper"]): row["verdict"] for row in rows}
    assert verdicts["dp2", "ddp"] == "equal"  # the wrapper broadcasts the weights
    assert verdicts["tp2 dp1", "ddp"] == "different"
    assert "final_layernorm" in next(row["parameter"] for row in rows if row["layout"] == "tp2 dp1")
    other_lines = [line for line in errors.splitlines() if not re.match(r"\d of 4: ", line)]
    assert other_lines == ["Transformer Engine is not installed: building layers in PyTorch"]


def test_verify_works_for_an_extension(tmp_path: Path) -> None:
    targets = tomllib.loads((EXTENSION / "pyproject.toml").read_text())["project"]["entry-points"]["bridge.targets"]
    (tmp_path / "bigram").symlink_to(EXTENSION / "src" / "bigram")
    declare(tmp_path, "bigram", targets)
    document = EXTENSION / "src" / "bigram" / "presets" / "bigram-tiny.yaml"
    code, rows, errors = verify(document, "--nproc", "2", *SHORT, path=tmp_path)
    assert code == 0, (errors, rows)
    equal = {(row["layout"], row["wrapper"]) for row in rows if row["verdict"] == "equal"}
    assert {("dp2", "ddp"), ("dp2", "megatron-fsdp"), ("dp2", "torch-fsdp2"), ("tp2 dp1", "ddp")} <= equal
    assert any("in-one-piece" in (row["reason"] or "") for row in rows)


def test_an_error_in_the_document_is_reported_once() -> None:
    code, out, errors = run_command("verify", "tiny", "transformer.num_layers=0.5", "--nproc", "2", "--json")
    assert code == 1
    assert out == ""
    assert "num_layers" in errors


ROW = Row(layout="tp2", wrapper="ddp", verdict=Verdict.EQUAL)
LIMITS = Tolerance(loss=1e-5, grad_norm=1e-4, weight=1e-3)


def make_result(loss: float = 2.0, grad_norm: float | None = 1.0, weight: float = 0.0) -> TrainingResult:
    return TrainingResult(losses=[3.0, loss], grad_norms=[1.0, grad_norm], weight_difference=weight, parameter="w")


@pytest.mark.parametrize(
    "found",
    [
        make_result(loss=2.0001),
        make_result(loss=math.nan),
        make_result(grad_norm=1.001),
        make_result(grad_norm=math.nan),
        make_result(grad_norm=None),
        make_result(weight=0.01),
        make_result(weight=math.nan),
    ],
)
def test_any_difference_beyond_rounding_is_a_mismatch(found: TrainingResult) -> None:
    assert judge(ROW, found, make_result(), LIMITS).is_mismatch


def test_rounding_is_not_a_mismatch() -> None:
    row = judge(ROW, make_result(loss=2.00001, grad_norm=1.00005, weight=1e-4), make_result(), LIMITS)
    assert row.verdict is Verdict.EQUAL
    assert row.loss_difference == pytest.approx(5e-6)


def test_an_overflow_equals_only_an_overflow() -> None:
    assert compute_relative_difference([1.0, None], [1.0, None]) == 0
    assert compute_relative_difference([None], [1.0]) == compute_relative_difference([1.0], [None]) == math.inf
