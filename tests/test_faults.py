"""A rank that dies, raises or differs ends all ranks of `bridge build` in bounded time, with an error that names it."""

from __future__ import annotations

import socket
import subprocess
import time

import pytest
from process_starts import Folder

LIMIT_S = 60  # after the fault
STARTING_S = 120  # for imports on a busy machine
TRAINING = ("--steps", "2", "--seq-length", "16", "--global-batch-size", "2", "--micro-batch-size", "1")

KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def wait_for_failure(folder: Folder, *processes: subprocess.Popen[str]) -> list[str]:
    """Wait for processes to fail; check that no process or file is left, and return what they wrote to stderr."""
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
def test_a_killed_rank_is_named(at: str, folder: Folder) -> None:
    folder.mark_at(at, KILL)
    (written,) = wait_for_failure(folder, folder.start("build", "tiny", "--nproc", "2", *TRAINING))
    assert "rank 1 was killed: SIGKILL, signal 9" in written


def test_a_rank_that_raises_in_a_hook_ends_the_waiting_rank(folder: Folder) -> None:
    folder.add_hook()
    (written,) = wait_for_failure(folder, folder.start("build", "tiny", "--nproc", "2", "pre_wrap_hooks=[faulty.hook]"))
    assert "rank 1: ValueError: a mistake of rank 1" in written
    assert f'  File "{folder.path}/faulty.py", line ' in written
    assert "Traceback" not in written


@pytest.mark.parametrize(
    ("lengths", "sizes", "difference"),
    [
        ((64, 32), (2, 2), "job.document.seq_length is 64 on rank 0, 32 on rank 1"),
        ((64, 64), (2, 4), "world size is 2 on rank 0, 4 on rank 1"),
        ((64, 64), (4, 2), "world size is 4 on rank 0, 2 on rank 1"),
    ],
    ids=["document", "larger world", "smaller world"],
)
def test_ranks_of_a_launcher_that_differ_are_refused(
    lengths: tuple[int, int], sizes: tuple[int, int], difference: str, folder: Folder
) -> None:
    folder.mark_at("bridge.dist.checks.agreement:agree")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [
        folder.start(
            "build", "tiny", f"seq_length={lengths[rank]}", RANK=str(rank), WORLD_SIZE=str(sizes[rank]), **meeting
        )
        for rank in range(2)
    ]
    for written in wait_for_failure(folder, *ranks):
        assert difference in written
