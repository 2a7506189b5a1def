"""A rank's place in the job, read from the environment of torchrun, srun or Bridge's own rank pool.

Importing this module does not import torch.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from bridge.dist.errors import LaunchError

# Below Linux's ephemeral ports (32768 and up), any of which another program may hold.
_FIRST_SLURM_PORT = 20_000
_SLURM_PORTS = 32_768 - _FIRST_SLURM_PORT
_STEPS_OF_A_JOB = 31  # a prime that does not divide _SLURM_PORTS: neighbouring jobs and steps get different ports


@dataclass(frozen=True, kw_only=True)
class RankEnvironment:
    """This process's rank, its node, and the rendezvous address of the job.

    ``node`` is the index of this machine among ``nodes``; ``local_rank`` and ``local_world_size`` count the ranks
    on it. They are None if the launcher does not set them. With ``has_agent`` the launcher serves the store, instead of
    rank 0. ``attempt`` separates jobs that share a store.
    """

    rank: int
    world_size: int
    address: str
    port: int
    node: int | None = None
    nodes: int | None = None
    local_rank: int | None = None
    local_world_size: int | None = None
    has_agent: bool = False
    attempt: str = "0"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise LaunchError(
                f"RANK is {self.rank}, WORLD_SIZE is {self.world_size}: RANK must be less than WORLD_SIZE"
            )
        if not 0 < self.port < 65_536:
            raise LaunchError(f"MASTER_PORT is {self.port}: a port must be between 1 and 65535")

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Self | None:
        """Return the rank environment; None if neither torchrun nor srun (with several tasks) started this process.

        Raises:
            LaunchError: A variable is missing or not an integer, or the nodes of the Slurm step cannot be listed.
        """
        if "RANK" in environment and "WORLD_SIZE" in environment:
            return cls._read_torchrun(environment)
        if "SLURM_STEP_ID" in environment and _read_integer(environment, "SLURM_NTASKS", default=1) > 1:
            return cls._read_slurm(environment)
        return None

    @classmethod
    def _read_torchrun(cls, environment: Mapping[str, str]) -> Self:
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]:
            raise LaunchError(
                f"RANK and WORLD_SIZE are set without {' and '.join(missing)}: start the ranks with torchrun or srun, "
                "or set both to the host of rank 0 and a free port on it"
            )
        return cls(
            rank=_read_integer(environment, "RANK"),
            world_size=_read_integer(environment, "WORLD_SIZE"),
            address=environment["MASTER_ADDR"],
            port=_read_integer(environment, "MASTER_PORT"),
            node=_read_optional_integer(environment, "GROUP_RANK"),
            nodes=_read_optional_integer(environment, "GROUP_WORLD_SIZE"),
            local_rank=_read_optional_integer(environment, "LOCAL_RANK"),
            local_world_size=_read_optional_integer(environment, "LOCAL_WORLD_SIZE"),
            has_agent=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    @classmethod
    def _read_slurm(cls, environment: Mapping[str, str]) -> Self:
        node = _read_optional_integer(environment, "SLURM_NODEID")
        return cls(
            rank=_read_integer(environment, "SLURM_PROCID"),
            world_size=_read_integer(environment, "SLURM_NTASKS"),
            address=environment.get("MASTER_ADDR") or _find_first_node(environment),
            port=_read_optional_integer(environment, "MASTER_PORT") or _choose_slurm_port(environment),
            node=node,
            nodes=_read_optional_integer(environment, "SLURM_NNODES"),
            local_rank=_read_integer(environment, "SLURM_LOCALID"),
            local_world_size=_count_tasks_on_node(environment, node),
        )

    def as_variables(self) -> dict[str, str]:
        """Return the same values as torchrun's environment variables."""
        values: dict[str, object] = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
            "GROUP_RANK": self.node,
            "GROUP_WORLD_SIZE": self.nodes,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_world_size,
            "TORCHELASTIC_USE_AGENT_STORE": self.has_agent,
            "TORCHELASTIC_RESTART_COUNT": self.attempt,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


def _read_integer(environment: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or re.fullmatch(r"\d{1,18}", text) is None:
        shown = "not set" if text is None else f"{text[:40]!r}"
        raise LaunchError(f"{name} is {shown}: expected an integer, as set by the launcher")
    return int(text)


def _read_optional_integer(environment: Mapping[str, str], name: str) -> int | None:
    return _read_integer(environment, name) if environment.get(name) else None


def _choose_slurm_port(environment: Mapping[str, str]) -> int:
    """Return a port that differs between jobs on one node and between steps of one job."""
    job = _read_integer(environment, "SLURM_JOB_ID")
    step = _read_integer(environment, "SLURM_STEP_ID")
    return _FIRST_SLURM_PORT + (job * _STEPS_OF_A_JOB + step) % _SLURM_PORTS


def _count_tasks_on_node(environment: Mapping[str, str], node: int | None) -> int | None:
    """Return how many ranks run on this node, from Slurm's compressed list: ``4(x2),1`` means 4, 4, 1."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE")
    if tasks is None or node is None:
        return _read_optional_integer(environment, "SLURM_NTASKS_PER_NODE")
    counts = [
        int(count)
        for count, times in re.findall(r"(\d{1,6})(?:\(x(\d{1,6})\))?", tasks)
        for _ in range(int(times or 1))
    ]
    return counts[node] if node < len(counts) else None


def _find_first_node(environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(
            f"cannot list the nodes of this Slurm step ({error}): set MASTER_ADDR to the first node"
        ) from error
    if not listed:
        raise LaunchError(f"scontrol lists no node in {nodes!r}: set MASTER_ADDR to the first node")
    return listed[0]
