"""A process that runs one function after another, so that what crashes or hangs costs its own row alone.

It imports nothing heavy itself. It is started anew after a crash, a time-out, or a CUDA error that leaves the device
unusable for the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

# How long after its limit a worker is killed: meanwhile it writes its stacks to the log.
_GRACE_S = 2.0


class WorkerError(RuntimeError):
    """A function raised, or its process died or took too long; the first line says what, the rest where."""


class WorkerTimeoutError(WorkerError):
    """A function took too long."""


class _Answer(NamedTuple):
    result: Any
    error: str | None
    usable: bool


class Worker:
    """Calls functions by name, ``module:function``, with plain arguments and results: only the process imports them.

    Args:
        log: Gets what the process prints, and its stacks when it hangs.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def run(self, function: str, *args: Any, limit: float, fresh: bool = False) -> Any:
        """Return what the function returns.

        Args:
            function: Where it is, ``module:function``; called with ``args``.
            limit: Seconds it may take, the start of the process included.
            fresh: Run in a process of its own, which ends afterwards.

        Raises:
            WorkerError: It raised or died; a WorkerTimeoutError: it took longer.
        """
        if fresh:
            self.close()
        try:
            return self._run(function, args, limit)
        finally:
            if fresh:
                self.close()

    def _run(self, function: str, args: tuple[Any, ...], limit: float) -> Any:
        connection = self._connected()
        name = f"{function}{args}"
        connection.send((function, args, limit))
        if not connection.poll(limit + _GRACE_S):
            self.close()
            raise WorkerTimeoutError(f"{name} took longer than {limit:.0f} s")
        try:
            answer: _Answer = connection.recv()
        except EOFError:
            assert self._process is not None
            self._process.join(_GRACE_S)
            code = self._process.exitcode
            self.close()
            raise WorkerError(f"the process of {name} died, exit code {code}") from None
        if not answer.usable:
            self.close()
        if answer.error is not None:
            raise WorkerError(answer.error)
        return answer.result

    def _connected(self) -> Connection:
        if self._connection is None:
            # Spawned: a forked process cannot use CUDA once its parent has asked for it.
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._log))
            self._process.start()
            theirs.close()
        return self._connection

    def close(self) -> None:
        """End the process, and what it started; the next call starts another."""
        if self._process is not None and self._process.pid is not None:
            for kill in (os.killpg, os.kill):  # it leads no group yet while it starts
                with contextlib.suppress(ProcessLookupError):
                    kill(self._process.pid, signal.SIGKILL)
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


def _serve(connection: Connection, log: Path) -> None:
    os.setsid()
    with log.open("a", buffering=1) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        while True:
            try:
                function, args, limit = connection.recv()
            except EOFError:  # the other side is gone
                return
            print(f"== {time.strftime('%H:%M:%S')} {function}{args}", file=file)
            faulthandler.dump_traceback_later(limit, file=file)
            answer = _answer(function, args)
            faulthandler.cancel_dump_traceback_later()
            connection.send(answer)


def _answer(function: str, args: tuple[Any, ...]) -> _Answer:
    environment = dict(os.environ)
    error = result = None
    try:
        module, _, name = function.partition(":")
        result = getattr(importlib.import_module(module), name)(*args)
    except BaseException as raised:  # an exit is an answer too
        traceback.print_exc()
        message = f"{type(raised).__name__}: {raised}".strip()
        error = "\n".join([message.partition("\n")[0], *traceback.format_exception(raised)])
    finally:
        # megatron-core 0.19.2 notes a model's attention backend there, and refuses another one after that.
        os.environ.clear()
        os.environ.update(environment)
    return _Answer(result, error, usable=_release())


def _release() -> bool:
    """Free what the function left on the device; whether the device can be used on."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        traceback.print_exc()
        return False
    return True
