"""Run a function on real ranks: one process each, gloo between them, the CPU runtime installed.

The processes come from a fork server that has imported torch and megatron-core once, so a run of two ranks costs
fractions of a second after the first.
"""

import contextlib
import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

PRELOAD = ["pytest", "torch", "torch.distributed", "megatron.core", "megatron.core.optimizer", "bridge.dist.cpu"]
SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
GRACE_S = 2.0


class RankError(RuntimeError):
    """A rank died, hung, or raised what cannot be sent here."""


class _Task(NamedTuple):
    """What a rank is to call; the module by its file, as test modules have no importable name."""

    module: str
    file: str
    function: str
    arguments: bytes


class _Rank(NamedTuple):
    process: BaseProcess
    reports: Connection


def run_ranks[T, *Ts](fn: Callable[[*Ts], T], world_size: int, *args: *Ts, timeout: float = 120) -> list[T]:
    """Call `fn(*args)` on `world_size` ranks and return the results by rank.

    `fn` is a top-level function of a file; arguments and results must pickle (tensors do, but to read one the caller
    imports megatron-core, which changes how they pickle: numbers are cheaper). Each rank has RANK, WORLD_SIZE,
    LOCAL_RANK and LOCAL_WORLD_SIZE in its environment, torch.distributed initialised and the CPU runtime installed.
    No process outlives the call, whatever happens.

    Raises:
        RankError: a rank died, or `timeout` seconds passed (the stacks of the ranks are then on stderr).
        Exception: what the first failing rank raised, with that rank's traceback as a note.
    """
    if "<locals>" in fn.__qualname__ or "<lambda>" in fn.__qualname__:
        raise TypeError(f"{fn.__qualname__} must be a top-level function: every rank loads it from its file")
    file = sys.modules[fn.__module__].__file__
    assert file is not None
    task = _Task(fn.__module__, file, fn.__qualname__, pickle.dumps(args))
    with tempfile.TemporaryDirectory() as directory, _started(task, world_size, Path(directory), timeout) as ranks:
        return [pickle.loads(result) for result in _collect(ranks, timeout)]


@contextlib.contextmanager
def _started(task: _Task, world_size: int, directory: Path, timeout: float) -> Iterator[list[_Rank]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with _environment(SERVER_ENVIRONMENT):
        forkserver.ensure_running()
    ranks: list[_Rank] = []
    try:
        for rank in range(world_size):
            reports, sender = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(
                target=_main, args=(task, rank, world_size, directory, timeout, sender)
            )
            ranks.append(_Rank(process, reports))
            process.start()
            sender.close()
        yield ranks
    finally:
        for process, reports in ranks:
            _kill(process)
            reports.close()


def _collect(ranks: list[_Rank], timeout: float) -> list[bytes]:
    """The pickled results by rank; raises as soon as one rank reports an error or dies."""
    deadline = time.monotonic() + timeout + GRACE_S
    results: dict[int, bytes] = {}
    pending = {rank.reports: number for number, rank in enumerate(ranks)}
    while pending:
        ready = connection.wait(list(pending), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(pending.values())} of {len(ranks)} did not finish in {timeout} s")
        for reports in ready:
            assert isinstance(reports, Connection)
            number = pending.pop(reports)
            results[number] = _receive(ranks[number], number)
    return [results[number] for number in range(len(ranks))]


def _receive(rank: _Rank, number: int) -> bytes:
    try:
        error, result = pickle.loads(rank.reports.recv_bytes())
    except EOFError:
        rank.process.join(GRACE_S)
        raise RankError(f"rank {number} died, exit code {rank.process.exitcode}") from None
    if error is not None:
        raise error
    assert isinstance(result, bytes)
    return result


def _main(task: _Task, rank: int, world_size: int, directory: Path, timeout: float, sender: Connection) -> None:
    """A rank's life: report once, then wait to be killed, so that its peers never fail for its having left first."""
    os.setsid()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    faulthandler.dump_traceback_later(timeout)
    try:
        report = pickle.dumps((None, _call(task, rank, world_size, directory, timeout)))
    except BaseException as error:  # an exit or an interrupt of the tested function is a report too
        report = pickle.dumps((_portable(error, rank), None))
    sender.send_bytes(report)
    signal.pause()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _call(task: _Task, rank: int, world_size: int, directory: Path, timeout: float) -> bytes:
    # Imported here: only the fork server and its children pay for torch.
    import torch

    from bridge.dist import cpu

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    module = _load(task)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    cpu.install()
    return pickle.dumps(getattr(module, task.function)(*pickle.loads(task.arguments)))


def _load(task: _Task) -> ModuleType:
    """The module of the task under the name it has in the parent, so that its classes pickle both ways."""
    package = task.module.partition(".")[0]
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        sys.modules[package] = ModuleType(package)  # pickle imports the first part of a dotted name
    if task.module not in sys.modules:
        spec = importlib.util.spec_from_file_location(task.module, task.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[task.module] = module
        spec.loader.exec_module(module)
    return sys.modules[task.module]


def _portable(error: BaseException, rank: int) -> BaseException:
    """The error with the remote traceback as a note, or a RankError in its place where it does not pickle."""
    text = f"on rank {rank}:\n{''.join(traceback.format_exception(error))}"
    error.add_note(text)
    try:
        portable = isinstance(pickle.loads(pickle.dumps(error)), Exception)
    except Exception:  # an exception's own constructor may raise anything when it is called with `args`
        portable = False
    return error if portable else RankError(text)


def _kill(process: BaseProcess) -> None:
    """End a rank and whatever it started: it leads a process group of its own."""
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
