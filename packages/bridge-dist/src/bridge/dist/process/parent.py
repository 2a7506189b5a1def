"""The end of the process that started this one. Importing this module does not import torch."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def die_with_launcher() -> None:
    """Let the kernel kill this process when torchrun's agent ends; nothing else would.

    Call it as early as possible: the end of an agent that has ended before goes unnoticed.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def call_when_parent_ends(function: Callable[[], object]) -> None:
    """Call a function in a thread when multiprocessing's parent of this process has ended, however it did."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_call() -> None:
        parent.join()
        function()

    threading.Thread(target=wait_and_call, daemon=True).start()
