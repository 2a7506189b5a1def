"""Ranks of a launcher report failures through the store; tests/test_nodes.py kills real ranks."""

from __future__ import annotations

import queue
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed

from bridge.dist.errors import LayoutError
from bridge.dist.run import failure_detection
from bridge.dist.run.rank_environment import RankEnvironment

LOST = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
# As torch 2.11 words the errors of NCCL.
NCCL = "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:77, {}, NCCL version 2.28.9\n{}\nLast error:\n{}"
NCCL_LOST = torch.distributed.DistBackendError(
    NCCL.format(
        "remote process exited or there was a network error",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "socketProgress: Connection closed by remote peer node1<40000>",
    )
)
NCCL_FULL = torch.distributed.DistBackendError(
    NCCL.format(
        "unhandled system error (run with NCCL_DEBUG=INFO for details)",
        "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.",
        "Error: failed to extend /dev/shm/nccl-A1b2C3 to 33030532 bytes: No space left on device",
    )
)


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
            threads.submit(failure_detection._report_failure, make_rank(rank), store, error)
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


def test_a_fault_of_nccl_on_one_rank_is_named_although_the_others_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    (verdict,) = verdicts({2: NCCL_FULL}, monkeypatch)
    assert verdict.startswith("rank 2 on node 1 (")
    assert "failed first: DistBackendError: NCCL error in: " in verdict
    assert verdict.endswith("No space left on device")


def test_lost_connections_between_ranks_that_all_report_are_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    (verdict,) = verdicts(dict.fromkeys(range(4), NCCL_LOST), monkeypatch)
    assert verdict.startswith("no rank is lost, but rank ")
    assert verdict.endswith("Connection closed by remote peer node1<40000>")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (LOST, None),
        (NCCL_LOST, None),
        (torch.distributed.DistNetworkError("reset"), None),
        (LayoutError("2 ranks do not fit"), "2 ranks do not fit"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
def test_the_cause_of_an_error_is_found(error: Exception, cause: str | None) -> None:
    assert failure_detection._find_cause(error) == cause


@pytest.fixture
def server() -> torch.distributed.TCPStore:
    return torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def make_first_rank(node: int, server: torch.distributed.TCPStore) -> RankEnvironment:
    """Return the only rank of one of two nodes."""
    place = {"rank": node, "world_size": 2, "node": node, "nodes": 2, "local_rank": 0}
    return RankEnvironment(**place, address="localhost", port=server.port, has_agent=True)


def test_a_node_sends_its_first_heartbeat_at_once(server: torch.distributed.TCPStore) -> None:
    with failure_detection.watch_nodes(make_first_rank(1, server)):
        assert torch.distributed.PrefixStore("bridge/0", server).add("heartbeat/1", 0) == 1


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> queue.SimpleQueue[str]:
    """Return the messages with which watchers of nodes would have ended this process; nodes are silent for 0.5 s."""
    messages: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr(failure_detection, "_exit_process", messages.put)
    monkeypatch.setattr(failure_detection, "_HEARTBEAT_INTERVAL_S", 0.05)
    monkeypatch.setattr(failure_detection, "_HEARTBEAT_TIMEOUT_S", 0.5)
    return messages


def test_a_node_whose_first_rank_fails_ends_ranks_that_wait_for_it(
    server: torch.distributed.TCPStore, ended: queue.SimpleQueue[str]
) -> None:
    """In a collective of NCCL, and before the ranks meet, nothing else would end them."""
    with failure_detection.watch_nodes(make_first_rank(0, server)):
        with pytest.raises(LayoutError), failure_detection.watch_nodes(make_first_rank(1, server)):
            raise LayoutError("no such file")
        verdict = ended.get(timeout=20)
    assert verdict == f"rank 1 on node 1 ({socket.gethostname()}) failed first: no such file"


def test_a_node_that_has_finished_ends_no_other(
    server: torch.distributed.TCPStore, ended: queue.SimpleQueue[str]
) -> None:
    with failure_detection.watch_nodes(make_first_rank(0, server)):
        with failure_detection.watch_nodes(make_first_rank(1, server)):
            pass
        with pytest.raises(queue.Empty):
            ended.get(timeout=1)
