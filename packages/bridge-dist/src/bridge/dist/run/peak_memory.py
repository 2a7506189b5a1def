"""Peak memory of this process, on its GPU and on the host."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Peak memory in bytes.

    ``allocated`` and ``reserved`` are those of torch's GPU allocator, None on the CPU. ``resident`` is the peak
    resident set of the process, with the interpreter and libraries; None if the system does not report it.
    """

    allocated: int | None
    reserved: int | None
    resident: int | None


def reset_peak_memory() -> None:
    """Restart the count of the GPU peak. The resident peak always covers the whole life of the process."""
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
    """Read VmHWM, which restarts at exec and, in a fork, at the parent's current size.

    Not ``ru_maxrss`` of ``getrusage``: it survives exec, so that a small program started by a large one reports the
    large one's peak (seen on Linux 6.18).
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024
