"""Where ranks come from: torch's elastic launcher on this machine, or torchrun and srun, which started us already.

Importing this module imports no torch.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import uuid
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from typing import Any, TypeVar

from bridge.dist.errors import LaunchError

ResultT = TypeVar("ResultT")

# Imported once by the fork server, from which the ranks are then forked.
_PRELOAD = ["bridge.dist.quiet", "bridge.dist.job"]


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, ... if this process is one of several that torchrun or srun started; empty if not.

    Raises:
        LaunchError: The nodes of the Slurm step cannot be listed.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {name: environment[name] for name in ("RANK", "WORLD_SIZE")}
    if "SLURM_STEP_ID" not in environment or int(environment.get("SLURM_NTASKS", "1")) == 1:
        return {}
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_node(environment),
        # Jobs that share a node must not meet: the port follows from the job's number.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000),
    }


def _first_node(environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(
            f"cannot list the nodes of this Slurm step ({error}): set MASTER_ADDR to the first node"
        ) from error
    return listed.stdout.split()[0]


def start_fork_server(ranks: int) -> None:
    """Begin to import torch and Megatron for the ranks, while this process goes on to check its input."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    forkserver.ensure_running()


def launch(function: Callable[..., ResultT], *args: object, ranks: int) -> ResultT:
    """Call a top-level function on each of ``ranks`` local ranks and return what it returned on rank 0.

    When a rank fails, or this process is interrupted, the others are ended.

    Raises:
        LaunchError: Names the rank that failed first, and why; or the signal.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The launcher logs every failed rank at length; the error raised here says what matters once.
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
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
        # A rank that is killed cannot say when: what its peers say of the lost connection bears an earlier time.
        killed = [(rank, failure) for rank, failure in error.failures.items() if failure.exitcode < 0]
        rank, failure = killed[0] if killed else error.get_first_failure()
        raise LaunchError(f"rank {rank}: {_reason(failure.message)}") from None
    except SignalException as signalled:
        raise LaunchError(f"ended by {signalled.sigval.name}, and all ranks with it") from None
    return results[0]


def _reason(message: Any) -> str:
    """The text of a failure: a signal's name, or what the rank's exception said (see ``record``)."""
    return str(message["message"] if isinstance(message, dict) else message)
