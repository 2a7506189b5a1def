"""Ranks of a launcher report failures through the store; tests/test_nodes.py kills real ranks."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed

from bridge.dist.errors import LayoutError
from bridge.dist.run import failure_detection
from bridge.dist.run.rank_environment import RankEnvironment

LOST = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")


def make_rank(rank: int) -> RankEnvironment:
    return RankEnvironment(rank=rank, world_size=4, address="localhost", port=1, node=rank // 2, nodes=2)


def verdicts(
    causes: dict[int, Exception], monkeypatch: pytest.MonkeyPatch, *, told_to_end: tuple[int, ...] = ()
) -> set[str]:
    """Report the failures of some ranks; return the verdicts that these ranks get."""
    monkeypatch.setattr(failure_detection, "_COLLECT_FAILURES_S", 0.5)
    store = torch.distributed.HashStore()
    for rank in range(4):
        store.set(f"names/{rank}", failure_detection._make_name(make_rank(rank)))
    monkeypatch.setattr(failure_detection, "open_store", lambda *_, **__: store)
    for rank in told_to_end:
        failure_detection._report_termination(make_rank(rank))
    with ThreadPoolExecutor() as threads:
        futures = [
            threads.submit(
                failure_detection._report_failure, make_rank(rank), store, failure_detection._find_cause(error)
            )
            for rank, error in causes.items()
        ]
        return {each.result() for each in futures}


def test_the_silent_rank_is_reported_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    (verdict,) = verdicts({0: LOST, 1: LOST, 3: LOST}, monkeypatch)
    assert verdict.startswith("lost rank 2 on node 1 (")


def test_ranks_that_were_told_to_end_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    (verdict,) = verdicts({0: LOST, 1: LOST}, monkeypatch, told_to_end=(3,))
    assert "rank 2 on node 1" in verdict
    assert "rank 3" not in verdict


def test_a_failed_rank_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    (verdict,) = verdicts({0: LOST, 1: LOST, 2: ValueError("a mistake"), 3: LOST}, monkeypatch)
    assert verdict.startswith("rank 2 on node 1 (")
    assert verdict.endswith("failed first: ValueError: a mistake")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (LOST, None),
        (torch.distributed.DistNetworkError("reset"), None),
        (LayoutError("2 ranks do not fit"), "2 ranks do not fit"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
def test_the_cause_of_an_error_is_found(error: Exception, cause: str | None) -> None:
    assert failure_detection._find_cause(error) == cause


def test_a_node_sends_its_first_heartbeat_at_once() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = torch.distributed.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    there = RankEnvironment(
        rank=1, world_size=2, address="localhost", port=port, node=1, nodes=2, local_rank=0, has_agent=True
    )
    with failure_detection.watch_nodes(there):
        assert torch.distributed.PrefixStore("bridge/0", server).add("heartbeat/1", 0) == 1
