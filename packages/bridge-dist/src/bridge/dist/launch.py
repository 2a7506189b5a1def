"""Running a function on every rank: local ranks by torch's elastic launcher, or the rank that this process already is."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import uuid
from collections.abc import Callable, Mapping
from typing import TypeVar

from bridge.dist.errors import LaunchError

ResultT = TypeVar("ResultT")

# Imported once by the fork server, before it forks the ranks.
_PRELOAD = ["torch", "megatron.core", "bridge.dist.job"]


def join_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the rank variables of torch for a task of a Slurm step; empty where there is none, or torchrun set them.

    Raises:
        LaunchError: The step's nodes cannot be listed.
    """
    tasks = int(environment.get("SLURM_NTASKS", "1"))
    if "RANK" in environment or "SLURM_STEP_ID" not in environment or tasks == 1:
        return {}
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_node(environment),
        # Steps of different jobs on one node must not meet: derive a port from the job.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000),
    }


def _first_node(environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(f"cannot list the nodes of this Slurm step ({error}): set MASTER_ADDR to the first") from error
    return listed.stdout.split()[0]


def start_fork_server(ranks: int) -> None:
    """Begin importing torch and Megatron for the ranks in the background, while this process checks its input."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    from multiprocessing import forkserver

    forkserver.ensure_running()


def launch(function: Callable[..., ResultT], *args: object, ranks: int) -> ResultT:
    """Run a top-level function on local ranks and return what rank 0 returned.

    The first rank that fails ends the others.

    Raises:
        LaunchError: Names the rank that failed first, and why.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The launcher logs each failure, with every rank's; the error that we raise says it once.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        start_method="forkserver",
    )
    try:
        results: dict[int, ResultT] = elastic_launch(config, function)(*args)
    except ChildFailedError as error:
        raise LaunchError(_first_failure(error)) from error
    return results[0]


def _first_failure(error: object) -> str:
    rank, failure = error.get_first_failure()  # type: ignore[attr-defined]
    return f"rank {rank} failed: {_reason(failure.message)}"


def _reason(message: object) -> str:
    return message if isinstance(message, str) else json.dumps(message)
