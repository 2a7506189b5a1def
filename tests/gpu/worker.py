"""A process that runs functions one after another, so that a crash or hang fails only its own row.

This module imports nothing heavy. The process is restarted after a crash, a timeout, a leak of device memory, or a CUDA
error that leaves the device unusable for the process.
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

# Device memory that a function may leave allocated: a leaked model would leave too little for the next one.
_MOST_HELD = 2**30
# Time between the limit and the kill, in which the worker writes its stacks to the log.
_GRACE_S = 2.0


class WorkerError(RuntimeError):
    """A function raised, died or timed out. The first line is the error, the rest its traceback."""


class WorkerTimeoutError(WorkerError):
    """A function exceeded its time limit."""


class _Answer(NamedTuple):
    result: Any
    error: str | None
    usable: bool


class Worker:
    """A caller of functions by name, ``module:function``, which only the worker process imports.

    Args:
        log: The file for the output of the process, and for its stacks when it hangs.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def run(self, function: str, *args: Any, limit: float) -> Any:
        """Run a function in the worker process and return its result.

        Args:
            function: The function, as ``module:function``, called with ``args``.
            limit: Seconds that it may take, including the start of the process.

        Raises:
            WorkerError: The function raised or its process died.
            WorkerTimeoutError: The function exceeded its limit.
        """
        connection = self._get_connection()
        name = f"{function}{args}"
        try:
            connection.send((function, args, limit))
            if not connection.poll(limit + _GRACE_S):
                self.close()
                raise WorkerTimeoutError(f"{name} took longer than {limit:.0f} s")
            answer: _Answer = connection.recv()
        except (EOFError, ConnectionError):  # a ConnectionError if the process had not read the call
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

    def _get_connection(self) -> Connection:
        if self._connection is not None and self._connection.poll():
            # An idle process sends nothing: it has died. NCCL's watchdog does that some time after a CUDA error.
            self.close()
        if self._connection is None:
            # Not forked: a forked process cannot use CUDA if its parent has initialised it.
            context = multiprocessing.get_context("spawn")
            self._connection, child_end = context.Pipe()
            self._process = context.Process(target=_serve, args=(child_end, self._log))
            self._process.start()
            child_end.close()
        return self._connection

    def close(self) -> None:
        """Kill the process and its children. The next call starts another."""
        if self._process is not None and self._process.pid is not None:
            for kill in (os.killpg, os.kill):  # it becomes the leader of a process group only after its start
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
            except EOFError:  # the parent has closed its end
                return
            print(f"== {time.strftime('%H:%M:%S')} {function}{args}", file=file)
            faulthandler.dump_traceback_later(limit, file=file)
            answer = _call(function, args)
            faulthandler.cancel_dump_traceback_later()
            connection.send(answer)


def _call(function: str, args: tuple[Any, ...]) -> _Answer:
    environment = dict(os.environ)
    error = result = None
    try:
        module, _, name = function.partition(":")
        result = getattr(importlib.import_module(module), name)(*args)
    except BaseException as raised:  # SystemExit is reported too
        traceback.print_exc()
        message = f"{type(raised).__name__}: {raised}".strip()
        error = "\n".join([message.partition("\n")[0], *traceback.format_exception(raised)])
    finally:
        # megatron-core 0.19.2 stores the attention backend in environment variables and refuses another one later.
        os.environ.clear()
        os.environ.update(environment)
    return _Answer(result, error, usable=_release())


def _release() -> bool:
    """Free the device memory of the function; return whether the next one finds a working and empty device."""
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
    held: int = torch.cuda.memory_allocated()
    if held > _MOST_HELD:
        sys.stderr.write(f"{held / 2**30:.1f} GiB of the device are still held\n")
    return held <= _MOST_HELD
