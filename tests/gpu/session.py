"""State of a session: the worker that runs the rows, the time limit, and the record of outcomes."""

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
# A row is not started with less time than this.
_SHORTEST_S = 5.0


class Session:
    """The worker of all rows, its machine, and the record."""

    def __init__(self) -> None:
        default = record.RECORD.with_name("rehearsal.json") if REHEARSING else record.RECORD
        self.path = Path(os.environ.get("BRIDGE_GPU_RECORD", default))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.worker = Worker(self.path.with_suffix(".log"))
        self.deadline = float(os.environ.get("BRIDGE_GPU_DEADLINE", math.inf))
        self.machine: dict[str, Any] = self.worker.run("gpu.machine:describe", limit=120)

    @property
    def can_run_rows(self) -> bool:
        """Whether rows can run on this machine."""
        return REHEARSING or self.machine["device"] is not None

    def clip_limit(self, limit: float) -> float:
        """Return the smaller of a limit and the remaining time of the session, in seconds.

        Skips the row if too little time remains.
        """
        left = self.deadline - time.time()
        if left < min(limit, _SHORTEST_S):
            pytest.skip("out of time")
        return min(limit, left)

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Write the outcome of a row to the record."""
        data = record.load(self.path)
        record.add_row(data, name, row, self.machine)
        record.write(data, self.path)


class Row:
    """A row, which runs functions in the worker or commands and checks their results."""

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
        """Name of the GPU; empty without one."""
        return self._session.machine["device"] or ""

    def needs(self, package: str) -> None:
        """Skip the row if a package is not installed."""
        if package not in self._session.machine["packages"]:
            pytest.skip(f"{package} is not installed")

    def needs_cuda(self) -> None:
        """Skip the row in a rehearsal."""
        if self.rehearsing:
            pytest.skip("needs CUDA")

    def run(self, function: str, *args: Any, limit: float = 60, fresh: bool = False) -> Any:
        """Run ``module:function`` in the worker, for ``limit`` seconds at most; ``fresh``: in a process of its own."""
        left = self._session.clip_limit(limit)
        try:
            return self._session.worker.run(function, *args, limit=left, fresh=fresh)
        except WorkerTimeoutError:
            if left < limit:
                pytest.skip("out of time")
            raise

    def bridge(self, *args: str | Path, limit: float = 120) -> Any:
        """Run the command `bridge` and return the JSON that it prints.

        Raises:
            RuntimeError: The command failed; the message is the last line of its standard error.
        """
        script = Path(sys.executable).with_name("bridge")
        command = [script if script.exists() else shutil.which("bridge") or "bridge", *args, "--json"]
        left = self._session.clip_limit(limit)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            stdout, stderr = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its ranks too
            process.communicate()
            if left < limit:
                pytest.skip("out of time")
            raise RuntimeError(f"bridge {args[0]} took longer than {limit:.0f} s") from None
        if process.returncode:
            raise RuntimeError(stderr.strip().rpartition("\n")[2] or f"exit code {process.returncode}")
        return json.loads(stdout)

    def measure(self, name: str, value: float, *, at_most: float | None = None) -> None:
        """Record a measurement and its limit, which ``judge`` checks."""
        self.figures[name] = {"value": value, "at_most": at_most}

    def judge(self) -> None:
        """Fail the row if a measurement exceeds its limit or is NaN."""
        wrong = [
            f"{name} is {figure['value']:.3g}, more than {figure['at_most']:.3g}"
            for name, figure in self.figures.items()
            if figure["at_most"] is not None and not figure["value"] <= figure["at_most"]  # type: ignore[operator]
        ]
        assert not wrong, "; ".join(wrong)
