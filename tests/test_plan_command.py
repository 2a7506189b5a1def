"""The command `bridge plan`."""

from __future__ import annotations

import html
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from environments import run_in_one_process

from bridge.config import Document


def bridge_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("bridge")), "plan", *arguments], capture_output=True, text=True
    )


SEARCH = ["search", "tiny", "transformer.num_layers=8", "--gpus", "4", "--tp", "2", "--wrap", "ddp"]
SEARCH += [
    "--micro-batch-size",
    "1",
    "--global-batch-size",
    "8",
    "--json",
    "-o",
    "fastest.yaml",
    "--machine",
    "ours.yaml",
    "--reserve",
    "2GiB",
    "--layers",
    "transformer-engine",
]
LINES = {
    "too little memory": ["plan", "tiny", "--tp", "2", "--gpu-memory", "6MiB", "--reserve", "4.5MiB"],
    "no tensor parallelism": ["plan", "tiny", "--tp", "0"],
    "apples": ["plan", "tiny", "--gpu-memory", "80 apples"],
    "heads": ["plan", "tiny", "--tp", "3"],
    **{
        f"strategy of {command[0]}": [*command, "--sharding-strategy", "optim"]
        for command in (["plan", "tiny"], ["build", "tiny"], ["search", "tiny", "--gpus", "2", "--wrap", "torch-fsdp2"])
    },
    "no FP8": ["plan", "tiny", "transformer.fp8=hybrid", "--machine", "a100"],
    "search without FP8": ["search", "tiny", "transformer.fp8=hybrid", "--gpus", "2", "--machine", "a100"],
    "search": SEARCH,
    "search again": SEARCH,
    "search with a strategy": [
        *("search", "tiny", "--gpus", "2", "--tp", "1", "--pp", "1", "--micro-batch-size", "1", "-o", "optim.yaml"),
        *("--wrap", "megatron-fsdp", "--sharding-strategy", "optim"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    (folder / "ours.yaml").write_text("memory_gib: 100\n")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, tuple[int, str, str]]:
    return dict(zip(LINES, run_in_one_process(list(LINES.values()), folder), strict=True))


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
    assert shown.stderr.endswith(f"{page}: written\n")
    found = json.loads(shown.stdout)
    assert (found["kind"], found["layers"]) == ("plan", "transformer_engine")
    assert found["world_size"] == 8
    assert found["parameters"] == 241_024
    assert found["reserve_bytes"] == 4 * 2**30
    assert [stage["pp"] for stage in found["stages"]] == [0, 1]
    assert {"weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes", "total_bytes", "flops"} < set(
        found["stages"][0]
    )
    assert found["command"].startswith("bridge plan tiny transformer.attention_backend=unfused --tp 2")
    assert found["overrides"] == ["transformer.attention_backend=unfused"]
    assert found["versions"]["torch"]
    written = page.read_text(encoding="utf-8")
    assert html.escape(found["command"]) in written
    assert f"torch {found['versions']['torch']}" in written


def test_the_command_reports_ranks_that_do_not_fit(results: dict[str, tuple[int, str, str]]) -> None:
    code, out, err = results["too little memory"]
    assert code == 1
    assert "and the reserve of 0.004 of 0.006 GiB: does not fit" in " ".join(out.split())
    # With one data-parallel rank nothing is sharded.
    assert "with --distributed-optimizer the largest rank needs" not in err
    assert re.search(
        r"with transformer\.sequence_parallel=true the largest rank needs [\d.]+ GiB .*, and a step takes [\d.]+ [mu]s",
        err,
    )


def test_the_command_refuses_invalid_options(results: dict[str, tuple[int, str, str]]) -> None:
    assert results["no tensor parallelism"][0] == 2
    assert results["apples"][0] == 2
    for command in ("plan", "build", "search"):
        code, _, err = results[f"strategy of {command}"]
        assert code == 2
        assert "--sharding-strategy needs --wrap megatron-fsdp, not" in " ".join(err.split())
    code, _, err = results["heads"]
    assert code == 1
    assert "num_attention_heads = 4 is not a multiple of tp = 3" in err
    for line in ("no FP8", "search without FP8"):
        code, _, err = results[line]
        assert code == 1
        assert "transformer.fp8: GPUs of a100 have no FP8: choose another --machine" in err


def test_a_search_writes_a_document_for_the_commands_that_it_prints(
    folder: Path, results: dict[str, tuple[int, str, str]]
) -> None:
    code, out, err = results["search"]
    assert not code, err
    found = json.loads(out)
    best = found["candidates"][0]
    transformer = Document.load(folder / "fastest.yaml").data["transformer"]
    assert (transformer["num_layers"], transformer["tensor_model_parallel_size"]) == (8, 2)
    assert transformer.get("pipeline_model_parallel_size", 1) == best["layout"]["pp"]
    [(code, out, err)] = run_in_one_process([[*shlex.split(found["commands"][0])[1:], "--json"]], folder)
    assert not code, err
    plan = json.loads(out)
    assert plan["layout"] == best["layout"]
    assert (plan["reserve_bytes"], plan["layers"]) == (2 * 2**30, "transformer_engine")
    assert plan["time"]["step_seconds"] == best["time"]["step_seconds"]
    assert max(stage["total_bytes"] for stage in plan["stages"]) == best["total_bytes"]
    code, _, err = results["search again"]
    assert code == 1
    assert "file exists: give --force" in err


def test_a_search_names_a_strategy_that_saves_no_checkpoints(
    results: dict[str, tuple[int, str, str]],
) -> None:
    code, out, err = results["search with a strategy"]
    assert not code, err
    assert "megatron-fsdp cannot save checkpoints with optim\n" in out
    assert "bridge build optim.yaml --wrap megatron-fsdp --sharding-strategy optim " in out
