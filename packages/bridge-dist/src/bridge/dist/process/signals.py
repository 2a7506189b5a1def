"""Signals while processes are started. Importing this module does not import torch."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def delay_signals() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the context is left.

    A handler that raises while a process is started would leave a process that nobody knows of, and nobody ends.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread runs handlers
        yield
        return
    delayed: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: delayed.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if delayed:
        signal.raise_signal(delayed[0])
