"""Compare the start of `bridge plan tiny` with one that imports torch's compiler, in turns.

uv run python tests/benchmarks/start.py [ROUNDS]
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys

RUN = "from bridge.config.cli.entry import main\nmain(['plan', 'tiny'])\n"
SIDES = {
    "as it is": RUN,
    "with the compiler": "from bridge.dist.process import imports\nimports.import_megatron = lambda **_: None\n" + RUN,
}


def measure_processor_seconds(program: str) -> float:
    """Run a program and return the processor time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    rounds = int(sys.argv[1]) if sys.argv[1:] else 5
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, program in SIDES.items():
            seconds[side].append(measure_processor_seconds(program))
    medians = {side: statistics.median(found) for side, found in seconds.items()}
    for side, found in seconds.items():
        sys.stdout.write(f"{side}: {medians[side]:.2f} s, {min(found):.2f} to {max(found):.2f}\n")
    one, other = medians.values()
    sys.stdout.write(f"ratio of the medians: {one / other:.2f}\n")


if __name__ == "__main__":
    main()
