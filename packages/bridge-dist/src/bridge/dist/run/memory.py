"""The peak memory of this process: on its GPU, and resident on the host."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Most bytes at once.

    ``allocated`` and ``reserved`` are those of torch's allocator on the GPU, None on the CPU. ``resident`` is the peak
    resident set of the process, with the interpreter and the libraries; None where the system does not tell.
    """

    allocated: int | None
    reserved: int | None
    resident: int | None


def reset_peak_memory() -> None:
    """Count the peak on the GPU from now on. The resident set's peak is that of the process's whole life."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def read_peak_memory() -> PeakMemory:
    """Return the peak memory of this process."""
    on_gpu = torch.cuda.is_available()
    return PeakMemory(
        allocated=torch.cuda.max_memory_allocated() if on_gpu else None,
        reserved=torch.cuda.max_memory_reserved() if on_gpu else None,
        resident=_read_peak_resident(),
    )


def _read_peak_resident() -> int | None:
    """Read VmHWM, which begins anew with a program and, in a fork, at what the parent holds at that time.

    ``getrusage`` would not do: its ``ru_maxrss`` is inherited through exec, so that a small program started by a large
    one shows the peak of the large one (seen on Linux 6.18).
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024
