"""Joining the store of the other ranks: every failure is a LaunchError."""

from __future__ import annotations

import re
import socket
from datetime import timedelta

import pytest

from bridge.dist.errors import LaunchError
from bridge.dist.run.rank_environment import RankEnvironment
from bridge.dist.run.store import open_store


def meet(rank: int, port: int, address: str = "localhost") -> None:
    place = RankEnvironment(rank=rank, world_size=2, address=address, port=port)
    open_store(place, timeout=timedelta(seconds=1))


def fails(message: str) -> pytest.RaisesExc[LaunchError]:
    return pytest.raises(LaunchError, match=re.escape(message))


def test_a_port_in_use_is_a_launch_error() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with fails(f"MASTER_ADDR=localhost, MASTER_PORT={port}: rank 0 cannot listen there, choose a free port"):
            meet(0, port)


def test_an_unknown_host_is_a_launch_error() -> None:
    with fails("MASTER_ADDR=no-such-host.invalid, MASTER_PORT=29500: no such host or port"):
        meet(1, 29500, "no-such-host.invalid")


def test_an_unresponsive_store_is_a_launch_error() -> None:
    with socket.socket() as silent:
        silent.bind(("localhost", 0))
        with fails("rank 0 does not answer there"):
            meet(1, silent.getsockname()[1])
