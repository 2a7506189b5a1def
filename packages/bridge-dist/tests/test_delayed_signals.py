"""Signals wait while a process is started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from bridge.dist.process.signals import delay_signals


def test_a_signal_waits_until_the_context_is_left() -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    try:
        with delay_signals():
            signal.raise_signal(signal.SIGTERM)
            assert caught == []
        assert caught == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


START_AND_WAIT = """
import multiprocessing, signal, time
from bridge.dist.process.signals import delay_signals

def wait(seconds):
    print("started", flush=True)
    time.sleep(seconds)
    print("alive", flush=True)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    child = multiprocessing.get_context("spawn").Process(target=wait, args=(1,))
    with delay_signals():
        child.start()
    try:
        child.join()
    except KeyboardInterrupt:
        child.join()
        print("interrupted")
"""


def test_a_process_that_is_started_leaves_ctrl_c_to_its_parent(tmp_path: Path) -> None:
    """A terminal sends it to both. The child would print a traceback, even while it imports its modules."""
    script = tmp_path / "start_and_wait.py"
    script.write_text(START_AND_WAIT)
    parent = subprocess.Popen(
        [sys.executable, script], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "started\n"
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.communicate(timeout=60) == ("alive\ninterrupted\n", "")
