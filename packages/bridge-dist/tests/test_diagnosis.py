"""`bridge doctor`: what bridge-dist finds out about requirements, devices and the launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bridge.config.cli.entry import bridge
from bridge.config.diagnosis import Finding
from bridge.dist.run import devices
from bridge.dist.run.diagnosis import find_machine

LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID", "SLURM_JOB_ID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def find(section: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in find_machine() if finding.section == section}


def test_this_environment_has_no_problems() -> None:
    assert [finding for finding in find_machine() if finding.is_problem] == []


def test_requirements_that_are_not_met_are_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bridge_config-0.1.0.dist-info"
    folder.mkdir()
    required = [
        "click>=99",
        "PyYAML>=6",
        "no-such-library; python_version < '3'",
        "no-such-library",
        "extra; extra == 'x'",
    ]
    lines = [
        "Metadata-Version: 2.4",
        "Name: bridge-config",
        "Version: 0.1.0",
        *(f"Requires-Dist: {one}" for one in required),
    ]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = [(finding.value, finding.meaning.partition(":")[0]) for finding in find_machine() if finding.is_problem]
    assert [value for value, _ in found] == ["requires click>=99", "requires no-such-library"]
    assert found[0][1].startswith("found 8.")
    assert found[1][1] == "found none"


def test_the_rank_is_read_as_bridge_build_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("Launcher")["rank"].value.startswith("none")
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    found = find("Launcher")
    assert found["rank"].value == "3 of 8, meeting at node0:29500"
    assert found["WORLD_SIZE"].value == "8"


def test_half_an_environment_of_torchrun_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find("Launcher")["rank"].is_problem
    done = CliRunner().invoke(bridge, ["doctor"])
    assert done.exit_code == 1
    assert "PROBLEM: unknown: RANK and WORLD_SIZE are set" in done.output


def test_hidden_gpus_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find("Devices")["GPUs"].meaning == "CUDA_VISIBLE_DEVICES hides them; ranks compute on the CPU"
    assert find("Launcher")["CUDA_VISIBLE_DEVICES"].value == "(empty)"


def test_a_driver_that_is_too_old_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a driver counts its GPUs, but torch can use none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_DRIVER_FILES", ("/dev/null",))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert find("Devices")["GPUs"].meaning.startswith("there is a driver, but torch can use no GPU")


def test_the_command_prints_json_and_lines_of_80_columns() -> None:
    done = CliRunner().invoke(bridge, ["doctor", "--json"])
    found = [Finding(**entry) for entry in json.loads(done.stdout)]
    assert {finding.section for finding in found} >= {"Python", "Packages", "Libraries", "Devices", "Launcher"}
    lines = CliRunner().invoke(bridge, ["doctor"]).stdout.splitlines()
    assert [line for line in lines if len(line) > 80 and "/" not in line] == []  # a path is not broken
    assert lines[0] == "Python:"
