"""Signals while processes are started. Importing this module does not import torch."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker


@contextlib.contextmanager
def delay_signals() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the context is left; processes that are started within never get Ctrl-C.

    A handler that raises while a process is started would leave a process that nobody knows of, and nobody ends. A
    terminal sends Ctrl-C to all processes: those that are started leave it to this one, which ends them.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread runs handlers
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing starts it with the first process, and then unblocks Ctrl-C
    delayed: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: delayed.append(number)) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited, but other threads still receive it
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if delayed:
        signal.raise_signal(delayed[0])
