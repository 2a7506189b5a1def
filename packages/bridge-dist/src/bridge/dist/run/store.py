"""The rendezvous store of a job's ranks."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from bridge.dist.errors import LaunchError
from bridge.dist.run.rank_environment import RankEnvironment


def open_store(rank_environment: RankEnvironment, *, timeout: timedelta) -> Store:
    """Connect to the store, which rank 0 or the launcher's agent serves.

    Does not wait for other ranks: they may disagree on the world size.

    Raises:
        LaunchError: No store answers at the address, or rank 0 cannot serve one there.
    """
    where = f"MASTER_ADDR={rank_environment.address}, MASTER_PORT={rank_environment.port}"
    serves = rank_environment.rank == 0 and not rank_environment.has_agent
    try:
        # torch retries an unknown host until the timeout, as it does for a host that is not up yet.
        socket.getaddrinfo(rank_environment.address, rank_environment.port)
        store = TCPStore(
            rank_environment.address,
            rank_environment.port,
            is_master=serves,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except OSError as error:
        raise LaunchError(f"{where}: no such host or port: {error}") from error
    except RuntimeError as error:  # torch 2.6 has no exception class for a port in use
        if serves:
            raise LaunchError(
                f"{where}: rank 0 cannot listen there, choose a free port: {_get_first_line(error)}"
            ) from error
        raise LaunchError(f"{where}: rank 0 does not answer there: {_get_first_line(error)}") from error
    return PrefixStore(f"bridge/{rank_environment.attempt}", store)


def _get_first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
