"""Where ranks come from: torch's elastic launcher on this machine, or torchrun and srun, which started us already.

Importing this module imports no torch.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from bridge.dist.errors import LaunchError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

ResultT = TypeVar("ResultT")

# Imported once by the fork server, from which the ranks are then forked.
_PRELOAD = ["bridge.dist.quiet", "bridge.dist.job"]
# How long a rank that failed keeps its connections: longer than the launcher takes to see one that was killed.
_LAST_BREATH_S = 1.0


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


def start_fork_server(ranks: int, *modules: str) -> None:
    """Begin to import torch, Megatron and more for the ranks, while this process goes on to check its input."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    multiprocessing.get_context("forkserver").set_forkserver_preload([*_PRELOAD, *modules])
    forkserver.ensure_running()


def launch(function: Callable[..., ResultT], *args: object, ranks: int) -> ResultT:
    """Call a top-level function on each of ``ranks`` local ranks and return what it returned on rank 0.

    The function is one that torch's ``record`` decorates, which leaves word of its error. When a rank fails, or this
    process is interrupted, the others are ended.

    Raises:
        LaunchError: Names the rank that failed first, and why; or the signal.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The launcher logs every failed rank at length; the error raised here says what matters once.
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with TemporaryDirectory(prefix="bridge-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            start_method="forkserver",
        )
        try:
            results: dict[int, ResultT] = elastic_launch(config, _run)(function, *args)
        except ChildFailedError as error:
            raise LaunchError(_first_failure(error, Path(folder))) from None
        except SignalException as signalled:
            raise LaunchError(f"ended by {signalled.sigval.name}, and all ranks with it") from None
    return results[0]


def _run(function: Callable[..., ResultT], *args: object) -> ResultT:
    """Call a function that torch's ``record`` decorates on this rank, and end the process when it fails."""
    try:
        return function(*args)
    except Exception:
        # Until now it has destroyed no group: peers that then lose their connection, and fail for it, do so later.
        time.sleep(_LAST_BREATH_S)
        raise SystemExit(1) from None  # the error is recorded; torch's own file of it would stay behind


def _first_failure(error: ChildFailedError, folder: Path) -> str:
    """Name the rank that failed first, and why.

    The launcher knows one rank that it saw ended, and not always the first. Only a rank that was killed ends without
    having waited; of the others the records tell who was first.
    """
    rank, failure = error.get_first_failure()
    records = sorted(folder.rglob("error.json"), key=lambda record: record.stat().st_mtime_ns)
    if failure.exitcode < 0 or not records:
        return f"rank {rank}: {failure.message}"
    message: Any = json.loads(records[0].read_text())["message"]["message"]
    return f"rank {records[0].parent.name}: {message}"
