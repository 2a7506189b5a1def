"""The store through which ranks find each other."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from bridge.dist.errors import LaunchError
from bridge.dist.run.rank_environment import RankEnvironment


def open_store(place: RankEnvironment, *, timeout: timedelta) -> Store:
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
    except RuntimeError as error:  # torch 2.6 has no class of its own for a port that is taken
        if serves:
            raise LaunchError(
                f"{where}: rank 0 cannot listen there, choose a free port: {_first_line(error)}"
            ) from error
        raise LaunchError(f"{where}: rank 0 does not answer there: {_first_line(error)}") from error
    return PrefixStore(f"bridge/{place.attempt}", store)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
