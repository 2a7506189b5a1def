"""Ranks read the variables of torchrun and srun; invalid variables are errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bridge.dist.errors import LaunchError
from bridge.dist.run.rank_environment import RankEnvironment

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "9",
    "SLURM_PROCID": "8",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_NNODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
    "MASTER_ADDR": "node1",
}


def read(environment: dict[str, str]) -> RankEnvironment:
    place = RankEnvironment.read(environment)
    assert place is not None
    return place


def test_a_single_process_is_a_world_of_one() -> None:
    assert RankEnvironment.read({}) is None
    assert RankEnvironment.read({"WORLD_SIZE": "4"}) is None
    assert RankEnvironment.read(SLURM | {"SLURM_NTASKS": "1"}) is None


def test_torchrun_variables_are_read() -> None:
    agent = {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    agent |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "5"}
    place = read(TORCHRUN | agent)
    assert (place.rank, place.world_size, place.address, place.port) == (3, 4, "node1", 29500)
    assert (place.node, place.nodes, place.local_rank, place.local_world_size) == (1, 2, 1, 2)
    assert place.has_agent
    assert place.attempt == "5"
    assert read(place.as_variables()) == place


def test_variables_set_by_hand_are_read() -> None:
    place = read(TORCHRUN)
    assert (place.node, place.local_rank, place.local_world_size, place.has_agent) == (None, None, None, False)
    assert read(place.as_variables()) == place


def test_srun_variables_are_read() -> None:
    place = read(SLURM)
    assert (place.rank, place.world_size, place.address) == (8, 9, "node1")
    assert (place.node, place.nodes, place.local_rank, place.local_world_size) == (2, 3, 0, 1)
    assert read(SLURM | {"SLURM_NODEID": "1", "SLURM_PROCID": "7", "SLURM_LOCALID": "3"}).local_world_size == 4


def test_jobs_and_steps_get_distinct_ports_below_the_ephemeral_range() -> None:
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    jobs = [
        read(SLURM | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port
        for job in (1, 4242, 4243, 99_999_999)
        for step in range(4)
    ]
    assert len(set(jobs)) == len(jobs)
    assert all(1024 < port < min(first_ephemeral, 32_768) for port in jobs)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "are set without MASTER_ADDR and MASTER_PORT: start the ranks with torchrun or srun",
        ),
        (TORCHRUN | {"MASTER_PORT": ""}, "RANK and WORLD_SIZE are set without MASTER_PORT:"),
        (TORCHRUN | {"RANK": "zero"}, "RANK is 'zero': expected an integer"),
        (TORCHRUN | {"RANK": "9" * 5000}, "RANK is '9999"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1'"),
        (TORCHRUN | {"RANK": "4"}, "RANK is 4, WORLD_SIZE is 4"),
        (TORCHRUN | {"LOCAL_RANK": "one"}, "LOCAL_RANK is 'one'"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT is 99999: a port must be between 1 and 65535"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({name: value for name, value in SLURM.items() if name != "SLURM_PROCID"}, "SLURM_PROCID is not set"),
        (SLURM | {"SLURM_NTASKS": "many"}, "SLURM_NTASKS is 'many'"),
    ],
)
def test_invalid_variables_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(message)) as caught:
        RankEnvironment.read(environment)
    assert len(str(caught.value)) < 300


def test_a_failing_scontrol_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LaunchError, match=r"cannot list the nodes of this Slurm step .*: set MASTER_ADDR"):
        RankEnvironment.read({name: value for name, value in SLURM.items() if name != "MASTER_ADDR"})
