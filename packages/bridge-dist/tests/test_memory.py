"""The peak memory of a process, without that of the process that started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bridge.dist.run.peak_memory import read_peak_memory

MIB = 2**20
CHILD = """\
import resource
from bridge.dist.run.peak_memory import read_peak_memory
print(read_peak_memory().resident, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def resident_now() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_the_peak_remains_after_memory_is_freed() -> None:
    before = resident_now()
    held = bytearray(300 * MIB)
    with_it = resident_now()
    del held
    peak = read_peak_memory()
    assert peak.allocated is None
    assert peak.reserved is None
    assert peak.resident is not None
    assert with_it > before + 290 * MIB
    assert peak.resident > with_it - MIB  # the kernel updates its counters with a delay
    assert resident_now() < peak.resident - 200 * MIB


def test_a_process_does_not_inherit_the_peak_of_its_parent() -> None:
    """``ru_maxrss`` includes the parent's peak. If the last assertion fails, ``getrusage`` can replace this code."""
    held = bytearray(1000 * MIB)
    ended = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    peak, inherited = map(int, ended.stdout.split())
    assert 50 * MIB < peak < len(held)
    assert inherited >= len(held)
