"""The process that started this one with multiprocessing. Importing this module does not import torch."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable


def call_when_parent_ends(function: Callable[[], object]) -> None:
    """Call a function in a thread when the parent process has ended, however it did: SIGKILL leaves it no time."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_call() -> None:
        parent.join()
        function()

    threading.Thread(target=wait_and_call, daemon=True).start()
