"""run_ranks returns results by rank, raises errors of ranks, and leaves no process behind."""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed
from ranks import RankError, run_ranks


@dataclass(frozen=True)
class _Result:
    environment: tuple[str, ...]
    total: float


def _compute(scale: float) -> _Result:
    rank = torch.ones((), device="cuda") * torch.distributed.get_rank()
    torch.distributed.all_reduce(rank)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return _Result(tuple(os.environ[name] for name in names), scale * rank.item())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_are_ordered_by_rank(world_size: int) -> None:
    total = sum(range(world_size))
    expected = [
        _Result((str(rank), str(rank), str(world_size), str(world_size)), 2.0 * total) for rank in range(world_size)
    ]
    assert run_ranks(_compute, world_size, 2.0) == expected


class _OddError(Exception):
    """An exception that can be pickled but not unpickled."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def _fail_on_the_last_rank(error: str) -> None:
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        raise {"plain": ValueError("a plain error"), "odd": _OddError(1, 2), "exit": SystemExit(3)}[error]
    torch.distributed.barrier()


def test_an_error_ends_all_ranks_and_is_raised_here() -> None:
    begin = time.monotonic()
    with pytest.raises(ValueError, match="a plain error") as caught:
        run_ranks(_fail_on_the_last_rank, 2, "plain")
    assert "on rank 1" in caught.value.__notes__[0]
    assert "_fail_on_the_last_rank" in caught.value.__notes__[0]
    assert time.monotonic() - begin < 60  # the barrier would wait for its time limit of 120 s


@pytest.mark.parametrize(("error", "text"), [("odd", "1 and 2"), ("exit", "SystemExit: 3")])
def test_an_error_that_cannot_be_unpickled_is_described(error: str, text: str) -> None:
    with pytest.raises(RankError, match=text):
        run_ranks(_fail_on_the_last_rank, 2, error)


def _die() -> None:
    if torch.distributed.get_rank() == 0:
        os._exit(7)
    torch.distributed.barrier()


def test_a_rank_that_dies_is_an_error() -> None:
    with pytest.raises(RankError, match="rank 0 ended with exit code 7"):
        run_ranks(_die, 2)


def _hang_with_a_child(fifo: Path) -> None:
    with fifo.open("wb", buffering=0) as pipe:
        pipe.write(b".")
        subprocess.run(["sleep", "1000"], stdout=pipe, check=True)


def test_a_hang_ends_with_everything_it_started(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(RankError, match=r"ranks \[0, 1\] of 2 did not finish in time"):
            run_ranks(_hang_with_a_child, 2, fifo, timeout=3)
        assert os.read(reader, 100) == b".."
        assert _is_closed(reader)
    finally:
        os.close(reader)


def _is_closed(reader: int) -> bool:
    """Return whether no process holds the other end of a pipe; killed processes close it with a delay."""
    for _ in range(50):
        try:
            return os.read(reader, 1) == b""
        except BlockingIOError:
            time.sleep(0.1)
    return False


def test_a_local_function_is_refused() -> None:
    with pytest.raises(TypeError, match="top-level"):
        run_ranks(lambda: None, 1)
