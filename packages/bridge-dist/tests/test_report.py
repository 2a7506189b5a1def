"""Reports of builds on GPUs, as data and as tables, and progress output."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from bridge.dist.run import progress
from bridge.dist.run.peak_memory import PeakMemory
from bridge.dist.run.progress import show_progress
from bridge.dist.run.report import BuildReport, ChunkReport, RankReport
from bridge.dist.run.tables import render_report
from bridge.dist.train.flops import find_peak_flops

GIB = 2**30


def make_rank_report(index: int, *, allocated: int) -> RankReport:
    wrappers = ["DistributedDataParallel", "Float16Module", "GPTModel"]
    return RankReport(
        rank=index,
        tp=index,
        pp=0,
        dp=0,
        cp=0,
        ep=0,
        chunks=[ChunkReport(vp_stage=0, layers=[0, 1], parameters=617_900_032, wrappers=wrappers)],
        peak_memory_bytes=PeakMemory(allocated=allocated, reserved=allocated + GIB, resident=3 * GIB),
    )


ON_GPUS = BuildReport(
    world_size=2,
    layout={"tp": 2, "pp": 1, "vp": 1, "cp": 1, "ep": 1, "etp": 2, "dp": 1},
    wrap="ddp",
    distributed_optimizer=True,
    sharding_strategy=None,
    weights=None,
    layers="pytorch",
    fusions=[],
    device="cuda",
    device_name="NVIDIA H100 80GB HBM3",
    device_peak_flops=989.4e12,
    seq_length=4096,
    micro_batch_size=1,
    global_batch_size=8,
    parameters=1_235_814_400,
    padded_parameters=1_235_814_400,
    ranks=[make_rank_report(0, allocated=20 * GIB), make_rank_report(1, allocated=21 * GIB)],
    iteration=12,
    saved="run",
    losses=[11.8, 11.7, 11.6],
    grad_norms=[5.0, 4.0, None],
    step_seconds=0.5,
    model_flops=494_700_000_000_000,
    document={"_target_": "bridge.models.gpt.GPTModelConfig"},
    overrides=[],
    versions={"torch": "2.11.0+cu130"},
)


def test_rates_are_derived_from_the_step_time() -> None:
    data = ON_GPUS.as_dict()
    assert data["kind"] == "build"
    assert data["tokens_per_second_per_gpu"] == 8 * 4096 / 0.5 / 2
    assert data["model_flops_utilization"] == pytest.approx(0.5)  # 494.7 TFLOPs in 0.5 s, out of 2 x 989.4 TFLOP/s
    assert data["ranks"][1]["peak_memory_bytes"] == {"allocated": 21 * GIB, "reserved": 22 * GIB, "resident": 3 * GIB}
    assert replace(ON_GPUS, device_peak_flops=None).as_dict()["model_flops_utilization"] is None
    untimed = replace(ON_GPUS, step_seconds=None).as_dict()
    assert untimed["tokens_per_second_per_gpu"] is untimed["model_flops_utilization"] is None


def test_the_tables_fit_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    for part in render_report(ON_GPUS):
        console.print(part)
    file = console.file
    assert isinstance(file, io.StringIO)
    shown = file.getvalue()
    assert "…" not in shown
    rows = [line.replace("│", " ").split() for line in shown.splitlines()]
    assert ["1", "21.000", "22.000", "3.000"] in rows
    assert ["10", "11.800000", "5.000000"] in rows  # the first step after those of a loaded checkpoint
    for said in (
        "step time: 0.500 s",
        "tokens per second: 65,536 (32,768 per rank)",
        "model-FLOPs utilisation: 50.0%",
        "skipped: overflow",
        "saved iteration 12 to run",
    ):
        assert said in shown


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_devices_have_their_published_peak_flops(name: str, tera: float | None) -> None:
    assert find_peak_flops(name) == (None if tera is None else tera * 1e12)


def test_progress_is_printed_as_lines_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a [1]", "b", "c"]

    def passed() -> list[str]:
        return list(
            show_progress(names, 3, describe=lambda done, item: f"after {item} comes {[*names, 'no more'][done]}")
        )

    assert passed() == names
    assert capsys.readouterr().err == ""  # nothing is printed for a fast loop
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    assert passed() == names
    assert capsys.readouterr().err.splitlines() == [
        "1 of 3: after a [1] comes b",
        "2 of 3: after b comes c",
        "3 of 3: after c comes no more",
    ]
