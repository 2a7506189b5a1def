"""Joining the ranks that the environment describes, and leaving them."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from collections.abc import Iterator

import torch
import torch.distributed
from torch._C._distributed_c10d import Store

from bridge.dist import cpu
from bridge.dist.checks.agreement import LONGEST_WAIT, Facts, agree
from bridge.dist.errors import LaunchError
from bridge.dist.run.devices import choose_gpu
from bridge.dist.run.failures import explain_lost_ranks
from bridge.dist.run.rank_environment import RankEnvironment
from bridge.dist.run.store import open_store

_OWN_GPU = "its own"


@contextlib.contextmanager
def join_world(mine: Facts) -> Iterator[None]:
    """Join the ranks that the environment describes (see ``RankEnvironment``), if they are about to do the same.

    On this rank's GPU with NCCL or, where there is none, on the CPU with gloo. They are left after a success only: who
    fails ends its process, and reports its error before its peers lose the connection.

    Args:
        mine: What this rank is about to do; see ``bridge.dist.checks.agreement``.

    Raises:
        AgreementError: On every rank, when one is about to do something else, sees a world of another size, or does not
            come.
        LaunchError: The environment describes no rank, the ranks cannot meet, two of them take one GPU, or one was
            lost on the way.
    """
    place = RankEnvironment.read(os.environ)
    if place is None:
        raise LaunchError("this process is no rank: start it with torchrun or srun, or set RANK and WORLD_SIZE")
    store = open_store(place, timeout=LONGEST_WAIT)
    on_gpu = torch.cuda.is_available()
    gpu = choose_gpu(place, gpus=torch.cuda.device_count()) if on_gpu else None
    facts = {
        **mine,
        "world size": str(place.world_size),
        "device": "cuda" if on_gpu else "cpu",
        "GPU": _OWN_GPU if gpu is None else _claim_gpu(gpu, place, store),
    }
    with explain_lost_ranks(place):
        agree(facts, store=store, rank=place.rank, world_size=place.world_size)
        with contextlib.ExitStack() as stack:
            if gpu is None:
                stack.enter_context(cpu.cpu_runtime())
            else:
                _use_gpu(gpu)
            # No `device_id`: NCCL would connect all groups, some twenty, before the first of them is used.
            torch.distributed.init_process_group(
                "gloo" if gpu is None else "nccl",
                store=store,
                rank=place.rank,
                world_size=place.world_size,
                timeout=LONGEST_WAIT,
            )
            yield
            torch.distributed.destroy_process_group()


def _claim_gpu(gpu: int, place: RankEnvironment, store: Store) -> str:
    """Note that this rank takes a GPU; say whose it is if another one took it before."""
    name = f"{socket.gethostname()}/{torch.cuda.get_device_properties(gpu).uuid}"
    holder = store.compare_set(f"gpus/{name}", "", str(place.rank)).decode()
    return _OWN_GPU if holder == str(place.rank) else f"that of rank {holder}"


def _use_gpu(gpu: int) -> None:
    """Compute on a GPU, where an earlier job of this process may have left memory."""
    torch.cuda.set_device(gpu)
    gc.collect()
    torch.cuda.empty_cache()
