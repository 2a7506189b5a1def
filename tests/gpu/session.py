"""State of a session: the worker that runs the rows, the time limit, and the record of outcomes."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gpu import record
from gpu.worker import Worker, WorkerTimeoutError

REHEARSING = "BRIDGE_GPU_REHEARSE" in os.environ
# A row is not started with less time than this.
_SHORTEST_S = 5.0
_ERROR_LINE = re.compile(r"^[\w.]*(?:Error|Exception)\b.*", re.MULTILINE)


class Session:
    """The worker of all rows, its machine, and the record."""

    def __init__(self) -> None:
        default = record.RECORD.with_name("rehearsal.json") if REHEARSING else record.RECORD
        self.path = Path(os.environ.get("BRIDGE_GPU_RECORD", default))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.log = self.path.with_suffix(".log")
        self.worker = Worker(self.log)
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

    def needs_capability(self, least: float) -> None:
        """Skip the row on a GPU of an older architecture."""
        if (found := self._session.machine["capability"]) < least:
            pytest.skip(f"needs compute capability {least}, not {found}")

    def needs_cuda(self) -> None:
        """Skip the row in a rehearsal."""
        if self.rehearsing:
            pytest.skip("needs CUDA")

    def run(self, function: str, *args: Any, limit: float = 60) -> Any:
        """Run ``module:function`` in the worker, for ``limit`` seconds at most."""
        left = self._session.clip_limit(limit)
        try:
            return self._session.worker.run(function, *args, limit=left)
        except WorkerTimeoutError:
            if left < limit:
                pytest.skip("out of time")
            raise

    def bridge(self, *args: str | Path, launcher: Sequence[str] = (), limit: float = 120) -> Any:
        """Run the command `bridge`, started by a launcher if one is given, and return the JSON that it prints.

        `bridge verify` prints its rows and exits with 1 if one of them differs: these are returned.

        Raises:
            RuntimeError: The command failed; the message is its error. Its standard error is in the log.
        """
        script = Path(sys.executable).with_name("bridge")
        found = script if script.exists() else shutil.which("bridge") or "bridge"
        command = [*launcher, found, *args, "--json", "--traceback"]
        left = self._session.clip_limit(limit)
        with self._session.log.open("a+") as log:
            log.write(f"== {time.strftime('%H:%M:%S')} bridge {' '.join(map(str, args))}\n")
            log.flush()
            start = log.tell()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
            try:
                stdout, _ = process.communicate(timeout=left)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if left < limit:
                    pytest.skip("out of time")
                raise RuntimeError(f"bridge {args[0]} took longer than {limit:.0f} s") from None
            log.seek(start)
            if process.returncode and not stdout:
                raise RuntimeError(find_error(log.read()) or f"exit code {process.returncode}")
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


def find_error(stderr: str) -> str:
    """Return the last line that names an error, of a traceback if there is one; otherwise the last line."""
    named = _ERROR_LINE.findall(stderr)
    return named[-1] if named else stderr.strip().rpartition("\n")[2]
