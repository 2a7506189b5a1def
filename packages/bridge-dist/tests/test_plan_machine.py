"""Machines: known ones, those of files, and the time of collectives on their links."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from example_plans import SMALL

from bridge.config import DocumentError
from bridge.dist.errors import PlanError
from bridge.dist.layout import Layout
from bridge.dist.plan.forecast.machine import count_ranks_per_domain, find_machine, list_machines, load_machine
from bridge.dist.plan.forecast.step_time import estimate_time
from bridge.dist.plan.results import Traffic


@pytest.mark.parametrize(
    ("layout", "group", "per_domain"),
    [
        # Stages of ranks 0 to 3 and 4 to 7: a data-parallel group is a domain.
        (Layout(pp=2, dp=4), "dp", [4, 4]),
        (Layout(pp=2, cp=2, dp=2), "dp_cp", [4, 4]),
        (Layout(dp=8), "dp", [4]),
        # Ranks 0 to 2 and 3 to 5: the second group has one rank before 4 and two from 4 on.
        (Layout(tp=3, dp=2), "tp", [1]),
        (Layout(tp=4, dp=2), "tp", [4]),
        (Layout(tp=2, dp=8), "dp", [2]),
        # Experts are split by etp, independent of tp.
        (Layout(tp=4, dp=2, ep=2, etp=1), "tp_ep", [2]),
        (Layout(tp=4, dp=2, ep=4, etp=2), "tp_ep", [4]),
        (Layout(dp=8, etp=8), "expt_tp", [4]),
        (Layout(dp=8, ep=2, etp=1), "expt_dp", [2]),
        (Layout(dp=8, ep=8, etp=1), "ep", [4]),
        # Ranks 0, 2, 4, 6: the second and the third stage are in different domains.
        (Layout(pp=4, dp=2), "pp", [2, 1, 1, 2]),
        (Layout(pp=2, dp=2), "embd", [2, 2]),
        (Layout(pp=4, dp=2), "embd", [1, 1, 1, 1]),
        (Layout(tp=4, cp=2), "tp_cp", [4]),
    ],
)
def test_the_ranks_of_a_group_are_counted_where_they_share_a_domain(
    layout: Layout, group: str, per_domain: list[int]
) -> None:
    counts = [count_ranks_per_domain(group, layout, pp=pp, gpus_per_domain=4) for pp in range(layout.pp)]
    assert counts == per_domain


def _time(operation: str, layout: Layout, *, group: str = "dp", ranks: int) -> float:
    machine = replace(load_machine("h100"), gpus_per_domain=4, domain_bandwidth=4e9, network_bandwidth=1e9)
    traffic = Traffic(group=group, ranks=ranks, operation=operation, calls=0, bytes=8 * 10**9)
    return machine.traffic_seconds(traffic, layout, pp=0)


def test_collectives_take_as_long_as_their_slowest_link() -> None:
    """3 and 0.8 GB/s are reached within a domain and between them."""
    assert _time("allgather", Layout(dp=4), ranks=4) == pytest.approx(8 * 3 / 4 / 3)
    assert _time("allreduce", Layout(dp=4), ranks=4) == pytest.approx(2 * 8 * 3 / 4 / 3)
    # Each of the two ranks of a domain has its own connection to the network; with four, the domain is slower.
    assert _time("reduce_scatter", Layout(tp=2, dp=8), ranks=8) == pytest.approx(8 * 7 / 8 / 1.6)
    assert _time("reduce_scatter", Layout(dp=8), ranks=8) == pytest.approx(8 * 7 / 8 / 3)
    # Of the tokens, half go to the other domain, which takes longer than exchanging a quarter within.
    assert _time("alltoall", Layout(dp=8, ep=8, etp=1), group="ep", ranks=8) == pytest.approx(8 / 2 / 0.8)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GB200", "gb200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L4", None),
        ("", None),
    ],
)
def test_machines_are_found_by_the_names_of_devices(device: str, name: str | None) -> None:
    found = find_machine(device)
    assert (found and found.name) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no fields of a machine: give some of bf16_flops"),
        ("speed: 1", "unknown fields speed: a machine has bf16_flops"),
        ("memory_gb: 141", "unknown fields memory_gb: a machine has bf16_flops"),
        ("bf16_flops: 989", "bf16_flops must be FLOPs per second, such as 989.0e12, got 989"),
        ("memory_bandwidth: 3.35 TB/s", "memory_bandwidth must be bytes per second, such as 3.35e12, got '3.35 TB/s'"),
        ("network_bandwidth: -50.0e9", "network_bandwidth must be bytes per second"),
        ("memory_gib: 85899345920", "memory_gib must be GiB, such as 79.6"),
        ("memory_gib: null", "memory_gib must be GiB, such as 79.6, got null"),
        ("gpus_per_domain: 0", "gpus_per_domain must be a number of GPUs, got 0"),
        ("exposed: 56", "exposed must be a share from 0 to 1"),
        ("product_efficiency: true", "product_efficiency must be a share above 0 and up to 1"),
        ("transposes_fp8: 1", "transposes_fp8 must be true or false"),
    ],
)
def test_a_file_says_what_is_wrong_with_it(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text(text + "\n")
    with pytest.raises(PlanError, match=re.escape(message)):
        load_machine(str(file))


def test_machines_have_names_and_files(tmp_path: Path) -> None:
    assert [load_machine(name).name for name in list_machines()] == list_machines()
    file = tmp_path / "ours.yaml"
    file.write_text("network_bandwidth: 25.0e9\n")
    assert load_machine(str(file)) == replace(load_machine("h100"), name=str(file), network_bandwidth=25e9)
    # A file does not pass for the known machine of the same name, whose estimates have known errors.
    same = tmp_path / "h100.yaml"
    same.write_text("memory_gib: 40\n")
    assert estimate_time(SMALL, load_machine(str(same))).validated == "not validated"
    file.write_text("memory_bandwidth: 4.8e12\nfp8_flops: null\ntransposes_fp8: false\n")
    assert load_machine(str(file)).memory_bandwidth == 4.8e12
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DocumentError, match=r"ours\.yaml: not valid UTF-8"):
        load_machine(str(file))
    with pytest.raises(DocumentError, match="cannot be read: Input/output error"):
        load_machine("/proc/self/mem")
    with pytest.raises(DocumentError, match="cannot be read: not a regular file"):
        load_machine(str(tmp_path))
    with pytest.raises(PlanError, match="'h1000' is neither a file nor a known machine: choose from h100, a100"):
        load_machine("h1000")
