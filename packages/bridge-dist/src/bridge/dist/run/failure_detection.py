"""Detect failed and lost ranks under torchrun or srun, so that each rank names the first failure and one prints it.

Ranks exchange failures and heartbeats through the rendezvous store. Ranks that Bridge starts itself do not need this:
their pool watches them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch.distributed
from torch._C._distributed_c10d import Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from bridge.dist.errors import DistError, LaunchError
from bridge.dist.run.rank_environment import RankEnvironment
from bridge.dist.run.store import open_store

# How long a rank that lost its connection waits for the other ranks' reports.
_COLLECT_FAILURES_S = 5.0
_STORE_TIMEOUT = timedelta(seconds=5)
_START_TIMEOUT = timedelta(minutes=10)
_HEARTBEAT_INTERVAL_S = 2.0
# Much longer than a healthy node stays silent (the heartbeat thread needs the GIL), and short enough to end a job
# within a minute.
_HEARTBEAT_TIMEOUT_S = 30.0
_PRINT_TIMEOUT_S = 3.0
_CONNECTION_ERRORS = (torch.distributed.DistNetworkError, torch.distributed.DistStoreError)
# Words of gloo and NCCL about a lost connection. gloo raises a plain RuntimeError; NCCL raises the same exception for
# faults of this rank's own, such as too little shared memory, which the other ranks do not notice.
_LOST_CONNECTION = ("gloo", "Connection closed by peer", "ncclRemoteError", "store->get")


@contextlib.contextmanager
def explain_lost_ranks(env: RankEnvironment) -> Iterator[None]:
    """Turn a lost connection into an error that names the rank that failed first.

    Raises:
        LaunchError: Names the rank that was lost or failed.
    """
    if env.world_size == 1 or _is_pool_rank(env):
        yield
        return
    try:
        open_store(env, timeout=_STORE_TIMEOUT).set(f"names/{env.rank}", _make_name(env))
        yield
    except SystemExit:
        _report_termination(env)
        raise
    except Exception as error:
        cause = _find_cause(error)
        try:
            verdict = _report_failure(env, open_store(env, timeout=_STORE_TIMEOUT), error)
        except (RuntimeError, LaunchError):
            verdict = _describe_lost_store(env)
        if cause is None:
            raise LaunchError(verdict) from error
        raise


def is_first_to_print(message: str, env: RankEnvironment) -> bool:
    """Return whether this rank should print an error that every rank may have found.

    Every rank prints it where the store is unreachable, and where no launcher collects their output.
    """
    if not ("TORCHELASTIC_RUN_ID" in os.environ or "SLURM_STEP_ID" in os.environ):
        return True
    try:
        store = open_store(env, timeout=_STORE_TIMEOUT)
        key = f"printed/{hashlib.sha256(message.encode()).hexdigest()}"
        count = store.add(key, 1)
        deadline = time.monotonic() + _PRINT_TIMEOUT_S
        while env.rank == 0 and not env.has_agent and store.add(key, 0) < env.world_size:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)  # rank 0 serves the store, which the other ranks still need
    except (RuntimeError, LaunchError):
        return True
    return count == 1


def record_for_launcher(error: BaseException) -> None:
    """Write the error to torchrun's error file, if torchrun started this process."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(error)


def _is_pool_rank(env: RankEnvironment) -> bool:
    return env.nodes == 1 and "TORCHELASTIC_RUN_ID" not in os.environ and env.has_agent


def _find_cause(error: Exception) -> str | None:
    """Return why this rank failed; None if it only lost its connection to others."""
    if isinstance(error, DistError):
        return str(error)
    text = str(error)
    if isinstance(error, _CONNECTION_ERRORS) or any(words in text for words in _LOST_CONNECTION):
        return None
    return f"{type(error).__name__}: {text}"


def _report_failure(env: RankEnvironment, store: Store, error: Exception) -> str:
    """Report this rank's failure to the others, and return the description of the first failure.

    Without a cause, this rank only lost a connection. The first such rank is the listener: it waits for the failure of
    another rank, and if none is reported, it names the ranks that are silent. The others wait for its verdict.
    """
    cause = _find_cause(error)
    store.set(f"ended/{env.rank}", cause or "")
    if cause is not None:
        return _report_cause(env, store, cause)
    if store.compare_set("listener", "", str(env.rank)).decode() != str(env.rank):
        store.wait(["verdict"], timedelta(seconds=2 * _COLLECT_FAILURES_S))
        return store.get("verdict").decode()
    deadline = time.monotonic() + _COLLECT_FAILURES_S
    while time.monotonic() < deadline and not store.check(["verdict"]):
        time.sleep(0.1)
    silent = [rank for rank in range(env.world_size) if not store.check([f"ended/{rank}"])]
    alive = f"no rank is lost, but {_make_name(env)} lost a connection: {error}"
    verdict = _describe_lost(silent, store) if silent else alive
    return store.compare_set("verdict", "", verdict).decode()


def _report_cause(env: RankEnvironment, store: Store, cause: str) -> str:
    """Report why this rank failed, unless another rank failed before; return the description of the first failure."""
    return store.compare_set("verdict", "", f"{_make_name(env)} failed first: {cause}").decode()


def _describe_lost(ranks: Sequence[int], store: Store) -> str:
    names = [_find_name(rank, store) for rank in ranks[:4]] + (["and more"] if len(ranks) > 4 else [])
    return f"lost {', '.join(names)}: killed, or its machine is down"


def _make_name(env: RankEnvironment) -> str:
    return f"rank {env.rank}" + ("" if env.node is None else f" on node {env.node} ({os.uname().nodename})")


def _find_name(rank: int, store: Store) -> str:
    return store.get(f"names/{rank}").decode() if store.check([f"names/{rank}"]) else f"rank {rank}"


def _describe_lost_store(env: RankEnvironment) -> str:
    server = "the launcher of node 0" if env.has_agent else "rank 0"
    return f"lost the store at {env.address}:{env.port}: {server}, which serves it, has ended"


@contextlib.contextmanager
def watch_nodes(env: RankEnvironment) -> Iterator[None]:
    """Send heartbeats for this node, and end this process when another node stops sending them.

    One rank per node does so. Rank 0 watches the nodes and informs the others. A node that never started is reported
    by the agreement check instead. If this rank fails, the others may wait for it, on a GPU even in a collective that
    never ends: they end when its heartbeats have stopped.
    """
    if env.node is None or (env.nodes or 1) == 1 or env.local_rank != 0:
        yield
        return
    # A separate connection: a thread that waits on a store blocks other threads that use it.
    store = open_store(env, timeout=_START_TIMEOUT)
    store.set(f"names/{env.rank}", _make_name(env))
    store.add(f"heartbeat/{env.node}", 1)  # at once: a node lost before its first heartbeat would go unnoticed
    done = threading.Event()
    threading.Thread(target=_send_heartbeats, args=(env, store, done), daemon=True).start()
    try:
        yield
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # the store may be gone
            _report_cause(env, store, _find_cause(error) or str(error))
        raise
    finally:
        done.set()
    with contextlib.suppress(RuntimeError):
        store.set(f"exited/{env.node}", "")


@contextlib.contextmanager
def exit_on_signals(env: RankEnvironment) -> Iterator[None]:
    """End this process at once on SIGTERM and Ctrl-C, even in a collective, where Python runs no signal handler.

    The termination is reported, so that the other ranks do not take this rank for the first that failed.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # set_wakeup_fd requires it
    before = signal.set_wakeup_fd(writer)  # Python writes each signal's number to this pipe
    threading.Thread(target=_exit_on_signal, args=(reader, env), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def _exit_on_signal(reader: int, env: RankEnvironment) -> None:
    while number := os.read(reader, 1):
        if number[0] in (signal.SIGINT, signal.SIGTERM):
            _report_termination(env)
            os._exit(128 + number[0])  # the exit code that shells give a process killed by this signal
    os.close(reader)


def _report_termination(env: RankEnvironment) -> None:
    with contextlib.suppress(RuntimeError, LaunchError):
        open_store(env, timeout=_STORE_TIMEOUT).set(f"ended/{env.rank}", "terminated by a signal")


def _send_heartbeats(env: RankEnvironment, store: Store, done: threading.Event) -> None:
    seen: dict[int, tuple[int, float]] = {}
    while not done.wait(_HEARTBEAT_INTERVAL_S):
        try:
            store.add(f"heartbeat/{env.node}", 1)
            if env.rank == 0 and (silent := _find_silent_node(env, store, seen)) is not None:
                ranks_on_node = [
                    rank for rank in range(env.world_size) if f" on node {silent} " in _find_name(rank, store)
                ]
                verdict = (
                    _describe_lost(ranks_on_node, store)
                    if ranks_on_node
                    else f"lost node {silent}, silent for {_HEARTBEAT_TIMEOUT_S:g} s"
                )
                store.compare_set("verdict", "", verdict)
                store.set("node_lost", "")
            if store.check(["node_lost"]):
                _exit_process(store.get("verdict").decode())
        except RuntimeError:
            if not done.is_set():
                _exit_process(_describe_lost_store(env))


def _find_silent_node(env: RankEnvironment, store: Store, seen: dict[int, tuple[int, float]]) -> int | None:
    """Return a node whose heartbeats have stopped."""
    now = time.monotonic()
    for node in range(env.nodes or 1):
        beats = store.add(f"heartbeat/{node}", 0)
        if node not in seen or seen[node][0] != beats:
            seen[node] = (beats, now)
        elif beats and now - seen[node][1] > _HEARTBEAT_TIMEOUT_S and not store.check([f"exited/{node}"]):
            return node
    return None


def _exit_process(message: str) -> None:
    """Print a message and end the process, even if its main thread hangs in a collective (sys.exit would not)."""
    record_for_launcher(LaunchError(message))
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
    os._exit(1)
