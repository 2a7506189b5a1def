"""The command `bridge plan`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def bridge_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("bridge")), "plan", *arguments], capture_output=True, text=True
    )


def test_the_command_prints_a_plan_and_writes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An earlier build or the user may have selected another attention backend than the document.
    monkeypatch.setenv("NVTE_FLASH_ATTN", "1")
    page = tmp_path / "plan.html"
    shown = bridge_plan(
        "tiny",
        "transformer.attention_backend=unfused",
        "--tp",
        "2",
        "--pp",
        "2",
        "--dp",
        "2",
        "--json",
        "--html",
        str(page),
    )
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert (found["kind"], found["layers"]) == ("plan", "pytorch")
    assert found["world_size"] == 8
    assert found["parameters"] == 241_024
    assert [stage["pp"] for stage in found["stages"]] == [0, 1]
    assert {"weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes", "total_bytes", "flops"} < set(
        found["stages"][0]
    )
    assert "<svg" in page.read_text(encoding="utf-8")


def test_the_command_reports_ranks_that_do_not_fit() -> None:
    shown = bridge_plan("tiny", "--tp", "2", "--gpu-memory", "3MiB")
    assert shown.returncode == 1
    assert "does not fit" in " ".join(shown.stdout.split())
    assert (
        "with --distributed-optimizer the largest rank needs" not in shown.stderr
    )  # with one data-parallel rank nothing is sharded
    assert "with transformer.sequence_parallel=true the largest rank needs" in shown.stderr


def test_the_command_refuses_invalid_options() -> None:
    assert bridge_plan("tiny", "--tp", "0").returncode == 2
    assert bridge_plan("tiny", "--gpu-memory", "80 apples").returncode == 2
    assert "--search needs --gpus" in bridge_plan("tiny", "--search").stderr
    assert "--search does not accept --dp" in bridge_plan("tiny", "--search", "--gpus", "2", "--html", "a.html").stderr
    refused = bridge_plan("tiny", "--tp", "3")
    assert refused.returncode == 1
    assert "num_attention_heads = 4 is not a multiple of tp = 3" in refused.stderr
