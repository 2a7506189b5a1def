"""Pool of local rank processes that are reused from job to job.

Importing this module does not import torch.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeVar

from bridge.config import BridgeError
from bridge.config.tracebacks import format_error
from bridge.dist.errors import LaunchError
from bridge.dist.process.imports import ATTENTION_BACKEND_VARIABLES, import_megatron
from bridge.dist.process.messages import relay, send_messages
from bridge.dist.process.parent import call_when_parent_ends
from bridge.dist.process.signals import delay_signals
from bridge.dist.run.rank_environment import RankEnvironment

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

ResultT = TypeVar("ResultT")
StartMethod = Literal["forkserver", "spawn"]

_PRELOAD = "bridge.dist.run.preload"
_ADDRESS = "localhost"
# Peers report a lost connection slightly before the killed rank itself is seen to have ended.
_KILL_DETECTION_S = 1.0
_EXIT_TIMEOUT_S = 5.0


def start_fork_server(ranks: int, *modules: str, first: Sequence[str] = ()) -> None:
    """Start importing torch, Megatron and ``modules`` for ranks on the CPU while this process checks its input.

    Modules named in ``first`` are imported before these.
    """
    share_cores(ranks)
    multiprocessing.get_context("forkserver").set_forkserver_preload([*first, _PRELOAD, *modules])
    with delay_signals():
        forkserver.ensure_running()


def share_cores(ranks: int) -> None:
    """Let each of some ranks that will start on this machine use its share of the cores, unless the user has chosen.

    torch would otherwise start a thread per core in every rank.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))


def launch(
    function: Callable[..., ResultT], *args: object, ranks: int, start_method: StartMethod = "forkserver"
) -> ResultT:
    """Call a top-level function on each of ``ranks`` local ranks and return what it returned on rank 0.

    Raises:
        LaunchError: Names the rank that failed first and why; ``__cause__`` is the exception of the function.
    """
    with RankPool(start_method=start_method) as pool:
        return pool.run(function, *args, ranks=ranks)[0]


class RankPool:
    """Processes on this machine that run one job after another as the ranks of a world.

    They start when a job first needs them. When one fails, all are killed, and the next job gets new ones. None
    outlives the process that created the pool.

    Args:
        start_method: ``forkserver`` forks ranks from a process that has imported everything. ``spawn`` imports again in
            each rank; ranks on GPUs need it, because CUDA is unusable in a forked process whose parent has queried
            CUDA devices, as importing megatron-core does.
    """

    def __init__(self, *, start_method: StartMethod = "forkserver") -> None:
        self._start_method: StartMethod = start_method
        self._ranks: list[_Rank] = []
        self._store: TCPStore | None = None
        self._jobs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def run(
        self, function: Callable[..., ResultT], *args: object, ranks: int, timeout: float | None = None
    ) -> list[ResultT]:
        """Call a top-level function on the first ``ranks`` ranks and return its results by rank.

        Each rank has this process's environment variables, and torchrun's, so that it can join a world.

        Args:
            function: Function to call, sent by name; arguments and results are pickled.
            args: Its arguments.
            ranks: Number of ranks.
            timeout: Limit in seconds; None for no limit.

        Raises:
            LaunchError: Names the rank that failed first and why, or the ranks that timed out; ``__cause__`` is the
                exception of the function.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self._start(ranks)
        self._jobs += 1
        try:
            for rank, worker in enumerate(self._ranks[:ranks]):
                task = _Task(function, args, self._make_variables(rank, ranks))
                with contextlib.suppress(BrokenPipeError):  # the rank has ended: _collect reports it
                    worker.connection.send(task)
            return _collect(self._ranks[:ranks], deadline)
        except BaseException:
            self._end_ranks()
            raise

    def close(self) -> None:
        """Kill the ranks."""
        atexit.unregister(self.close)
        self._end_ranks()
        self._store = None

    def _start(self, ranks: int) -> None:
        # An idle rank sends nothing, so a readable connection means that the rank has ended.
        if any(worker.connection.poll() for worker in self._ranks):
            self._end_ranks()
        context = multiprocessing.get_context(self._start_method)
        if not self._ranks:
            # Python waits for them at exit. Daemons could not start processes, as writing a checkpoint does.
            atexit.register(self.close)
        while len(self._ranks) < ranks:
            here, there = context.Pipe()
            process: BaseProcess = context.Process(  # type: ignore[attr-defined]
                target=_serve, args=(there, self._start_method)
            )
            with delay_signals():
                process.start()
                self._ranks.append(_Rank(process, here))
            there.close()  # so that reading from the pipe fails once the rank, which has the only other copy, ends

    def _end_ranks(self) -> None:
        ranks, self._ranks = self._ranks, []
        for worker in ranks:
            worker.end()

    def _make_variables(self, rank: int, world_size: int) -> dict[str, str]:
        if self._store is None:
            from torch._C._distributed_c10d import TCPStore  # takes 1 s: import it while ranks start

            # Port 0 lets the system choose a free port. One store serves all jobs, separated by their attempt.
            self._store = TCPStore(_ADDRESS, 0, is_master=True, wait_for_workers=False)
        rank_environment = RankEnvironment(
            rank=rank,
            world_size=world_size,
            address=_ADDRESS,
            port=self._store.port,
            node=0,
            nodes=1,
            local_rank=rank,
            local_world_size=world_size,
            has_agent=True,
            attempt=str(self._jobs),
        )
        return dict(os.environ) | rank_environment.as_variables()


class _Task(NamedTuple):
    """A function call for a rank, and its environment variables."""

    function: Callable[..., Any]
    args: tuple[object, ...]
    variables: Mapping[str, str]


class _Rank(NamedTuple):
    process: BaseProcess
    connection: Connection

    def end(self) -> None:
        """Kill the rank and its children: it leads its own process group."""
        if self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join()
        self.connection.close()


class _Message(NamedTuple):
    """A log message of a running rank."""

    text: str


@dataclass(frozen=True)
class _Failure:
    """Exception of a rank's function; ``error`` is None if it cannot be pickled."""

    message: str
    details: str
    error: BaseException | None


def _collect(ranks: Sequence[_Rank], deadline: float | None) -> list[Any]:
    """Return the results by rank.

    Raises:
        LaunchError: A rank failed or ended, or the deadline passed.
    """
    results: dict[int, Any] = {}
    pending = {worker.connection: rank for rank, worker in enumerate(ranks)}
    while pending:
        patience = None if deadline is None else max(0.0, deadline - time.monotonic())
        answers = connection.wait(list(pending), patience)
        if not answers:
            raise LaunchError(f"ranks {sorted(pending.values())} of {len(ranks)} did not finish in time")
        for answer in answers:
            assert isinstance(answer, Connection)
            rank = pending.pop(answer)
            try:
                result = answer.recv()
            except (EOFError, ConnectionResetError):
                raise LaunchError(_describe_end(rank, ranks[rank].process)) from None
            if isinstance(result, _Message):
                relay(result.text)
                pending[answer] = rank
                continue
            if isinstance(result, _Failure):
                _raise_if_killed(pending.values(), ranks)
                raise _make_launch_error(rank, result) from result.error
            results[rank] = result
    return [results[rank] for rank in range(len(ranks))]


def _make_launch_error(rank: int, failure: _Failure) -> LaunchError:
    error = LaunchError(f"rank {rank}: {failure.message}")
    error.add_note(failure.details)
    return error


def _raise_if_killed(pending: Iterable[int], ranks: Sequence[_Rank]) -> None:
    """Raise if one of the pending ranks was killed: the others failed because they lost their connection to it."""
    sentinels = {ranks[rank].process.sentinel: rank for rank in pending}
    for ended in connection.wait(list(sentinels), _KILL_DETECTION_S):
        rank = sentinels[ended]  # type: ignore[index]
        raise LaunchError(_describe_end(rank, ranks[rank].process))


def _describe_end(rank: int, process: BaseProcess) -> str:
    process.join(_EXIT_TIMEOUT_S)
    code = process.exitcode
    if code is not None and code < 0:
        return f"rank {rank} was killed: {signal.Signals(-code).name}, signal {-code}"
    return f"rank {rank} ended with exit code {code}"


def _serve(tasks: Connection, start_method: StartMethod) -> None:
    """Run incoming tasks one after the other, as a rank."""
    os.setsid()  # a process group of its own, which is killed together with processes that the function starts
    call_when_parent_ends(lambda: os.killpg(0, signal.SIGKILL))
    sending = threading.Lock()  # any thread may log a message while the result is sent

    def send(answer: object) -> None:
        with sending:
            tasks.send(answer)

    send_messages(lambda text: send(_Message(text)))
    import_megatron(with_compiler=start_method == "spawn")
    while True:
        try:
            message = tasks.recv_bytes()
        except EOFError:
            return
        try:
            task: _Task = pickle.loads(message)  # may raise: it imports the function's module
            _forget_attention_backend()
            os.environ.update(task.variables)
            result = task.function(*task.args)
            gc.collect()  # models keep process groups alive, whose threads wake a hundred times a second
            send(result)
        except BaseException as error:  # SystemExit of the function is a failure too
            send(_make_failure(error))
            # Keep connections open until killed: otherwise peers would report a lost connection before this error.
            signal.pause()


def _forget_attention_backend() -> None:
    """Forget the choice of an earlier job, or of the process that started the fork server."""
    for name in ATTENTION_BACKEND_VARIABLES:
        os.environ.pop(name, None)


def _make_failure(error: BaseException) -> _Failure:
    details = "".join(traceback.format_exception(error))
    message = f"{type(error).__name__}: {error}" if isinstance(error, BridgeError) else format_error(error)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # unpickling calls the exception's constructor, which may raise anything
        return _Failure(message, details, None)
    return _Failure(message, details, error)
