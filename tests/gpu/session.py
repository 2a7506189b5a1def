"""A session of rows: the worker they run in, the time they have, and the record of what became of them."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gpu import record
from gpu.worker import Worker, WorkerTimeoutError

REHEARSING = "BRIDGE_GPU_REHEARSE" in os.environ
# What a row needs at least: less is not worth a start.
_SHORTEST_S = 5.0


class Session:
    """The worker of all rows, the machine it is on, and the record."""

    def __init__(self) -> None:
        default = record.RECORD.with_name("rehearsal.json") if REHEARSING else record.RECORD
        self.path = Path(os.environ.get("BRIDGE_GPU_RECORD", default))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.worker = Worker(self.path.with_suffix(".log"))
        self.deadline = float(os.environ.get("BRIDGE_GPU_DEADLINE", math.inf))
        self.machine: dict[str, Any] = self.worker.run("gpu.machine:describe", limit=120)

    @property
    def is_at_work(self) -> bool:
        """Whether rows can run on this machine."""
        return REHEARSING or self.machine["device"] is not None

    def clip(self, limit: float) -> float:
        """Return a limit in seconds, or what is left of the session where that is less.

        Skips the row when nothing is left.
        """
        left = self.deadline - time.time()
        if left < min(limit, _SHORTEST_S):
            pytest.skip("out of time")
        return min(limit, left)

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Write what became of a row."""
        data = record.load(self.path)
        record.add_row(data, name, row, self.machine)
        record.write(data, self.path)


class Row:
    """One row: runs functions in the worker, or commands, and judges what they return."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.rehearsing = REHEARSING
        self.figures: dict[str, dict[str, float | None]] = {}

    @property
    def devices(self) -> int:
        """Number of GPUs."""
        count: int = self._session.machine["devices"]
        return count

    @property
    def device(self) -> str:
        """Name of the GPU, empty where there is none."""
        return self._session.machine["device"] or ""

    def needs(self, package: str) -> None:
        """Skip the row where a package is not installed."""
        if package not in self._session.machine["packages"]:
            pytest.skip(f"{package} is not installed")

    def needs_cuda(self) -> None:
        """Skip the row in a rehearsal."""
        if self.rehearsing:
            pytest.skip("needs CUDA")

    def run(self, function: str, *args: Any, limit: float = 60, fresh: bool = False) -> Any:
        """Run ``module:function`` in the worker, for ``limit`` seconds at most; ``fresh``: in a process of its own."""
        left = self._session.clip(limit)
        try:
            return self._session.worker.run(function, *args, limit=left, fresh=fresh)
        except WorkerTimeoutError:
            if left < limit:
                pytest.skip("out of time")
            raise

    def bridge(self, *args: str | Path, limit: float = 120) -> Any:
        """Run the command `bridge` and return the JSON that it prints.

        Raises:
            RuntimeError: It failed; the message is the last line of what it said.
        """
        script = Path(sys.executable).with_name("bridge")
        command = [script if script.exists() else shutil.which("bridge") or "bridge", *args, "--json"]
        left = self._session.clip(limit)
        started = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            stdout, stderr = started.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)  # its ranks too
            started.communicate()
            if left < limit:
                pytest.skip("out of time")
            raise RuntimeError(f"bridge {args[0]} took longer than {limit:.0f} s") from None
        if started.returncode:
            raise RuntimeError(stderr.strip().rpartition("\n")[2] or f"exit code {started.returncode}")
        return json.loads(stdout)

    def measure(self, name: str, value: float, *, at_most: float | None = None) -> None:
        """Record a figure, and what it may be at most; ``judge`` says whether all are."""
        self.figures[name] = {"value": value, "at_most": at_most}

    def judge(self) -> None:
        """Fail if a figure is larger than it may be, or not a number."""
        wrong = [
            f"{name} is {figure['value']:.3g}, more than {figure['at_most']:.3g}"
            for name, figure in self.figures.items()
            if figure["at_most"] is not None and not figure["value"] <= figure["at_most"]  # type: ignore[operator]
        ]
        assert not wrong, "; ".join(wrong)
