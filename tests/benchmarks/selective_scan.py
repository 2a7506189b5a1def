"""Compare the selective scan with the recurrence that it computes: time and peak memory of a step, as ratios.

    uv run python tests/benchmarks/selective_scan.py [LENGTH ...]

One layer of 8 heads of 64 channels with a state of 64, forward and backward, each time in a fresh process.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from ranks import run_ranks

HEADS, CHANNELS, STATE, CHUNK_SIZE, ROUNDS = 8, 64, 64, 128, 3


class Cost(NamedTuple):
    seconds: float
    peak_mib: float


def measure(length: int, *, by_scan: bool) -> Cost:
    import torch

    from bridge.models.backend.scan import selective_scan

    generator = torch.Generator().manual_seed(1)
    x, dt, b, c = (
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in [(1, length, HEADS, CHANNELS), (1, length, HEADS), (1, length, 1, STATE), (1, length, 1, STATE)]
    )
    a = -torch.linspace(1, 16, HEADS)
    before, start = read_resident_mib("VmRSS"), time.process_time()
    steps = torch.nn.functional.softplus(dt - 3)
    if by_scan:
        y, _ = selective_scan(x, steps, a, b, c, chunk_size=CHUNK_SIZE)
    else:
        state, outputs = torch.zeros(1, HEADS, CHANNELS, STATE), []
        for at in range(length):
            decay = (steps[:, at] * a).exp()[..., None, None]
            state = decay * state + (steps[:, at, :, None] * x[:, at])[..., None] * b[:, at, :, None, :]
            outputs.append((state @ c[:, at, 0, :, None])[..., 0])
        y = torch.stack(outputs, dim=1)
    y.square().mean().backward()
    return Cost(time.process_time() - start, read_resident_mib("VmHWM") - before)


def read_resident_mib(which: str) -> float:
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def run_scan(length: int) -> Cost:
    return measure(length, by_scan=True)


def run_recurrence(length: int) -> Cost:
    return measure(length, by_scan=False)


def main() -> None:
    sys.stdout.write(f"{'tokens':>8} {'recurrence':>22} {'scan':>22} {'time':>8} {'memory':>8}\n")
    for length in [int(given) for given in sys.argv[1:]] or [512, 2048, 4096]:
        rounds = [(run_ranks(run_recurrence, 1, length)[0], run_ranks(run_scan, 1, length)[0]) for _ in range(ROUNDS)]
        recurrence, scan = (
            Cost(*(statistics.median(values) for values in zip(*costs, strict=True)))
            for costs in zip(*rounds, strict=True)
        )
        shown = [f"{cost.seconds:8.2f} s {cost.peak_mib:8.0f} MiB" for cost in (recurrence, scan)]
        ratios = [f"{new / old:7.3f}x" for new, old in zip(scan, recurrence, strict=True)]
        sys.stdout.write(f"{length:8} {shown[0]:>22} {shown[1]:>22} {ratios[0]:>8} {ratios[1]:>8}\n")


if __name__ == "__main__":
    main()
