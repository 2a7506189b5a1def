"""A signal ends a command, whatever its code does with the exception."""

from __future__ import annotations

import subprocess
import sys

SETUP = """
import signal, time
from bridge.config.cli.entry import _exit_on_signals
"""
SWALLOWED = """
with _exit_on_signals():
    try:
        signal.raise_signal(signal.SIGTERM)
    except:
        pass
    time.sleep(60)
"""
CLEANED_UP = """
with _exit_on_signals():
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        time.sleep(1)
        print("cleaned up")
"""


def run(code: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", SETUP + code], capture_output=True, text=True, check=False, timeout=30)
    assert not done.stderr
    return done.returncode, done.stdout


def test_an_exception_that_a_library_swallows_is_raised_again() -> None:
    assert run(SWALLOWED) == (128 + 15, "")


def test_cleaning_up_is_not_interrupted() -> None:
    assert run(CLEANED_UP) == (128 + 2, "cleaned up\n")
