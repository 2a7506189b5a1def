"""A signal ends a command, whatever its code does with the exception."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
SWALLOWED_BY_PYTHON = """
import weakref
with _exit_on_signals():
    function = lambda: None
    reference = weakref.ref(function, lambda _: signal.raise_signal(signal.SIGTERM))
    del function
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


@pytest.mark.parametrize("code", [SWALLOWED, SWALLOWED_BY_PYTHON])
def test_an_exception_that_is_swallowed_is_raised_again(code: str) -> None:
    assert run(code) == (128 + 15, "")


def test_cleaning_up_is_not_interrupted() -> None:
    assert run(CLEANED_UP) == (128 + 2, "cleaned up\n")
