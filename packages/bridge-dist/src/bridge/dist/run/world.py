"""Joining and leaving the world of ranks that the environment describes."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed
from torch._C._distributed_c10d import Store

from bridge.dist import cpu
from bridge.dist.checks.agreement import LONGEST_WAIT, Facts, agree, collect_facts, collect_versions
from bridge.dist.errors import LaunchError
from bridge.dist.run.devices import choose_gpu
from bridge.dist.run.failure_detection import explain_lost_ranks
from bridge.dist.run.rank_environment import RankEnvironment
from bridge.dist.run.store import open_store

_OWN_GPU = "its own"
# Longer than ranks that have finished drift apart while NCCL closes their connections.
_LONGEST_FAREWELL = timedelta(seconds=30)


@contextlib.contextmanager
def join_world(mine: Facts | None = None) -> Iterator[None]:
    """Join the world that the environment describes (see ``RankEnvironment``), if all ranks agree on the job.

    Uses NCCL on this rank's GPU or, without GPUs, gloo on the CPU. The process group is destroyed only on success: a
    failing rank reports its error before its process ends and its peers lose the connection.

    Args:
        mine: Facts about this rank's job that all ranks must share, see ``bridge.dist.checks.agreement``; by default
            the versions of the libraries.

    Raises:
        AgreementError: On every rank, if one differs in a fact or in the world size, or does not join.
        LaunchError: The environment describes no rank, the ranks cannot connect, two of them use one GPU, or one
            was lost.
    """
    rank_environment = RankEnvironment.read(os.environ)
    if rank_environment is None:
        raise LaunchError("RANK and WORLD_SIZE are not set: start this process with torchrun or srun, or set them")
    store = open_store(rank_environment, timeout=LONGEST_WAIT)
    on_gpu = torch.cuda.is_available()
    gpu = choose_gpu(rank_environment, gpus=torch.cuda.device_count()) if on_gpu else None
    facts = {
        **(collect_facts(versions=collect_versions()) if mine is None else mine),
        "world size": str(rank_environment.world_size),
        "device": "cuda" if on_gpu else "cpu",
        "GPU": _OWN_GPU if gpu is None else _claim_gpu(gpu, rank_environment, store),
    }
    with explain_lost_ranks(rank_environment):
        agree(facts, store=store, rank=rank_environment.rank, world_size=rank_environment.world_size)
        with contextlib.ExitStack() as stack:
            if gpu is None:
                stack.enter_context(cpu.cpu_runtime())
            else:
                _use_gpu(gpu)
            # Without `device_id`: with it NCCL would connect all groups, about twenty, before their first use.
            torch.distributed.init_process_group(
                "gloo" if gpu is None else "nccl",
                store=store,
                rank=rank_environment.rank,
                world_size=rank_environment.world_size,
                timeout=LONGEST_WAIT,
            )
            yield
            torch.distributed.destroy_process_group()
    _leave(rank_environment, store)


def _claim_gpu(gpu: int, rank_environment: RankEnvironment, store: Store) -> str:
    """Register this rank as the user of a GPU; return which rank uses it already, if any."""
    name = f"{socket.gethostname()}/{torch.cuda.get_device_properties(gpu).uuid}"
    holder = store.compare_set(f"gpus/{name}", "", str(rank_environment.rank)).decode()
    return _OWN_GPU if holder == str(rank_environment.rank) else f"that of rank {holder}"


def _use_gpu(gpu: int) -> None:
    """Select a GPU, and free what an earlier job of this process left in its memory."""
    torch.cuda.set_device(gpu)
    gc.collect()
    torch.cuda.empty_cache()


def _leave(rank_environment: RankEnvironment, store: Store) -> None:
    """Let rank 0 leave last if it serves the store: the others would take its end for a failure."""
    if rank_environment.has_agent:
        return
    with contextlib.suppress(RuntimeError):  # a rank that ended otherwise is no error of this one
        store.set(f"left/{rank_environment.rank}", "")
        if rank_environment.rank == 0:
            store.wait([f"left/{rank}" for rank in range(rank_environment.world_size)], _LONGEST_FAREWELL)
