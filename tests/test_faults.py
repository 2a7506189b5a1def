"""A rank that dies, raises or differs ends all ranks in bounded time, and the cause is named: on the real command."""

from __future__ import annotations

import os
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

BRIDGE = str(Path(sysconfig.get_path("scripts")) / "bridge")
LIMIT_S = 60  # from the fault on
STARTING_S = 120  # imports, on a machine that is busy
TRAINING = ("--steps", "2", "--seq-length", "16", "--global-batch-size", "2", "--micro-batch-size", "1")

# What Python runs at the start of every process that finds it: replaces a function on rank 1, once it is imported.
FAULT = """
import functools, importlib, os, pathlib, signal, sys

def fail(*args, **options):
    if os.environ.get("RANK") == "1":
        pathlib.Path(__file__).with_name("mark").touch()
        {action}
    return original(*args, **options)

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "bridge.dist.run.world":
            return None
        sys.meta_path.remove(Finder)
        module = importlib.import_module("{module}")
        *owners, function = "{function}".split(".")
        owner = functools.reduce(getattr, owners, module)
        global original
        original = getattr(owner, function)
        setattr(owner, function, functools.wraps(original)(fail))
        return None

sys.meta_path.insert(0, Finder)
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
HOOK = """
import os, pathlib

def hook(stages):
    if os.environ["RANK"] == "1":
        pathlib.Path(__file__).with_name("mark").touch()
        raise ValueError("a mistake of rank 1")
    return stages
"""


class Folder:
    """A folder for everything that the processes of a run leave behind, where those processes are known by it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path / "temporary"
        self.temporary.mkdir()

    def mark_at(self, place: str, action: str = "pass") -> None:
        """Let rank 1 note the time, and do something, when it calls a function, given as ``module:function``."""
        module, _, function = place.partition(":")
        (self.path / "sitecustomize.py").write_text(FAULT.format(action=action, module=module, function=function))

    def add_hook(self) -> None:
        """Install a hook, which documents may name, that raises on rank 1."""
        (self.path / "faulty.py").write_text(HOOK)
        installed = self.path / "faulty-1.dist-info"
        installed.mkdir()
        (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
        (installed / "entry_points.txt").write_text("[bridge.targets]\nfaulty.hook = faulty:hook\n")

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(self.path),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **variables,
        }
        return subprocess.Popen(
            [BRIDGE, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.path,
        )

    def processes(self) -> list[int]:
        """Processes that were started by way of ``start`` and live, at whatever depth of the tree."""
        mark = f"TMPDIR={self.temporary}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # ended, or of another user
                continue
        return found


@pytest.fixture
def folder() -> Iterator[Folder]:
    with tempfile.TemporaryDirectory(prefix="f") as path:  # short: sockets are made below it
        folder = Folder(Path(path))
        yield folder
        for process in folder.processes():
            os.kill(process, 9)


def finished(folder: Folder, *processes: subprocess.Popen[str]) -> list[str]:
    """What failing processes wrote on standard error; of them, and all that they started and wrote, nothing is left."""
    written = [process.communicate(timeout=LIMIT_S + STARTING_S)[1] for process in processes]
    assert all(process.returncode == 1 for process in processes), written
    deadline = (folder.path / "mark").stat().st_mtime + LIMIT_S
    while folder.processes() and time.time() < deadline:
        time.sleep(0.1)
    assert time.time() < deadline
    assert folder.processes() == []
    assert [entry for entry in folder.temporary.iterdir() if not entry.name.startswith("torchinductor_")] == []
    return written


@pytest.mark.parametrize(
    "at",
    [
        pytest.param("megatron.core.parallel_state:initialize_model_parallel", id="while groups are made"),
        pytest.param("megatron.core.models.gpt.gpt_model:GPTModel.__init__", id="while building"),
        pytest.param("torch.distributed:broadcast", id="in a broadcast"),
        pytest.param("megatron.core.optimizer.optimizer:ChainedOptimizer.step", id="in a step"),
    ],
)
def test_a_rank_that_is_killed(at: str, folder: Folder) -> None:
    folder.mark_at(at, KILL)
    (written,) = finished(folder, folder.start("build", "tiny", "--nproc", "2", *TRAINING))
    assert "rank 1 was killed: SIGKILL, signal 9" in written


def test_a_rank_that_raises_in_a_hook_while_the_other_waits_for_it(folder: Folder) -> None:
    folder.add_hook()
    (written,) = finished(folder, folder.start("build", "tiny", "--nproc", "2", "pre_wrap_hooks=[faulty.hook]"))
    assert "rank 1: ValueError: a mistake of rank 1" in written


@pytest.mark.parametrize(
    ("lengths", "sizes", "difference"),
    [
        ((64, 32), (2, 2), "job.document.seq_length is 64 on rank 0, 32 on rank 1"),
        ((64, 64), (2, 4), "world size is 2 on rank 0, 4 on rank 1"),
        ((64, 64), (4, 2), "world size is 4 on rank 0, 2 on rank 1"),
    ],
    ids=["document", "larger world", "smaller world"],
)
def test_ranks_that_somebody_else_started_and_that_differ(
    lengths: tuple[int, int], sizes: tuple[int, int], difference: str, folder: Folder
) -> None:
    folder.mark_at("bridge.dist.agreement:agree")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [
        folder.start(
            "build", "tiny", f"seq_length={lengths[rank]}", RANK=str(rank), WORLD_SIZE=str(sizes[rank]), **meeting
        )
        for rank in range(2)
    ]
    for written in finished(folder, *ranks):
        assert difference in written
