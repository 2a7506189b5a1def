"""Joining the ranks that the environment describes, and leaving them."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from bridge.dist import cpu
from bridge.dist.agreement import LONGEST_WAIT, Facts, agree
from bridge.dist.errors import LaunchError
from bridge.dist.run.devices import choose_gpu
from bridge.dist.run.failures import explained
from bridge.dist.run.rank_environment import RankEnvironment

_OWN_GPU = "its own"


@contextlib.contextmanager
def world(mine: Facts) -> Iterator[None]:
    """Join the ranks that the environment describes (see ``RankEnvironment``), if they are about to do the same.

    On this rank's GPU with NCCL or, where there is none, on the CPU with gloo. They are left after a success only: who
    fails ends its process, and reports its error before its peers lose the connection.

    Args:
        mine: What this rank is about to do; see ``bridge.dist.agreement``.

    Raises:
        AgreementError: On every rank, when one is about to do something else, sees a world of another size, or does not
            come.
        LaunchError: The environment describes no rank, the ranks cannot meet, two of them take one GPU, or one was
            lost on the way.
    """
    place = RankEnvironment.read(os.environ)
    if place is None:
        raise LaunchError("this process is no rank: start it with torchrun or srun, or set RANK and WORLD_SIZE")
    store = open_store(place)
    on_gpu = torch.cuda.is_available()
    gpu = choose_gpu(place, gpus=torch.cuda.device_count()) if on_gpu else None
    about = {
        **mine,
        "world size": str(place.world_size),
        "device": "cuda" if on_gpu else "cpu",
        "GPU": _OWN_GPU if gpu is None else _claim(gpu, place, store),
    }
    with explained(place, connect=lambda: open_store(place)):
        agree(about, store=store, rank=place.rank, world_size=place.world_size)
        with contextlib.ExitStack() as stack:
            if gpu is None:
                stack.enter_context(cpu.cpu_runtime())
            else:
                _take(gpu)
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


def open_store(place: RankEnvironment, *, timeout: timedelta = LONGEST_WAIT) -> Store:
    """Connect to the store that rank 0 serves, or the launcher's agent.

    It does not wait for a number of ranks, which is what they may disagree on.

    Raises:
        LaunchError: There is none at the address of the environment, or rank 0 cannot serve it there.
    """
    where = f"MASTER_ADDR={place.address}, MASTER_PORT={place.port}"
    serves = place.rank == 0 and not place.has_agent
    try:
        # torch would look for an unknown host for as long as it waits for one that is not up yet.
        socket.getaddrinfo(place.address, place.port)
        store = TCPStore(
            place.address,
            place.port,
            is_master=serves,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except OSError as error:
        raise LaunchError(f"{where}: no such host or port: {error}") from error
    except torch.distributed.DistError as error:
        if serves:
            raise LaunchError(
                f"{where}: rank 0 cannot listen there, choose a free port: {_first_line(error)}"
            ) from error
        raise LaunchError(f"{where}: rank 0 does not answer there: {_first_line(error)}") from error
    return PrefixStore(f"bridge/{place.attempt}", store)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _claim(gpu: int, place: RankEnvironment, store: Store) -> str:
    """Note that this rank takes a GPU; say whose it is if another one took it before."""
    name = f"{socket.gethostname()}/{torch.cuda.get_device_properties(gpu).uuid}"
    holder = store.compare_set(f"gpus/{name}", "", str(place.rank)).decode()
    return _OWN_GPU if holder == str(place.rank) else f"that of rank {holder}"


def _take(gpu: int) -> None:
    """Compute on a GPU, where an earlier job of this process may have left memory."""
    torch.cuda.set_device(gpu)
    gc.collect()
    torch.cuda.empty_cache()
