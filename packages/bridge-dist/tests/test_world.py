"""Ranks join and leave a world; tests/test_cluster_page.py has worlds of launchers."""

from __future__ import annotations

import socket

import rank_functions

from bridge.dist.run.pool import RankPool, start_fork_server


def test_rank_0_leaves_last_if_it_serves_the_store() -> None:
    start_fork_server(2)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with RankPool() as pool:
        first, last = pool.run(rank_functions.leave_world_after, (0, 1), port, ranks=2)
    assert first > last - 0.5  # it would leave a second earlier
