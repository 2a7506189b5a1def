"""Pools of local ranks, and how ranks are started on machines with GPUs."""

from __future__ import annotations

import os
import pickle
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import rank_functions

from bridge.dist.errors import LaunchError
from bridge.dist.process.messages import start_run
from bridge.dist.run.pool import RankPool, launch, start_fork_server


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    start_fork_server(2)
    with RankPool() as pool:
        yield pool


def wait_until_gone(process: int) -> None:
    deadline = time.monotonic() + 30  # generous, for a busy machine
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ranks_are_reused_by_the_next_job(pool: RankPool) -> None:
    first = pool.run(rank_functions.process_id, ranks=2)
    assert len(set(first)) == 2
    assert pool.run(rank_functions.process_id, ranks=2) == first
    assert pool.run(rank_functions.process_id, ranks=1) == first[:1]


def test_each_rank_knows_its_place(pool: RankPool) -> None:
    assert pool.run(rank_functions.rank_variables, ranks=2) == [("0", "2", "0", "2"), ("1", "2", "1", "2")]
    assert pool.run(rank_functions.rank_variables, ranks=1) == [("0", "1", "0", "1")]


def test_a_job_has_the_environment_of_its_caller(pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.run(rank_functions.process_id, ranks=1)  # the rank is up before the variable is set
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert pool.run(rank_functions.read_variable, "NCCL_DEBUG", ranks=1) == ["INFO"]


def test_a_job_does_not_see_the_attention_backend_of_an_earlier_one(pool: RankPool) -> None:
    pool.run(rank_functions.set_variable, "NVTE_FLASH_ATTN", "0", ranks=1)
    assert pool.run(rank_functions.read_variable, "NVTE_FLASH_ATTN", ranks=1) == [None]


def test_the_first_error_is_raised_and_later_jobs_run(pool: RankPool) -> None:
    with pytest.raises(LaunchError, match=r"^rank 1: ValueError: a mistake") as caught:
        pool.run(rank_functions.fail_on, 1, ranks=2)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "in fail_on" in caught.value.__notes__[0]
    assert len(pool.run(rank_functions.process_id, ranks=2)) == 2


def test_log_messages_of_ranks_are_not_repeated(pool: RankPool, caplog: pytest.LogCaptureFixture) -> None:
    start_run()
    for message in ("slower than need be", "slower than need be", "something else"):
        assert pool.run(rank_functions.log, message, ranks=2) == [message, message]
    assert [record.getMessage() for record in caplog.records] == ["slower than need be", "something else"]


def test_a_rank_that_exits_is_an_error(pool: RankPool) -> None:
    with pytest.raises(LaunchError, match="rank 0 ended with exit code 7"):
        pool.run(rank_functions.exit_on, 0, ranks=2)
    with pytest.raises(LaunchError, match="rank 1 was killed: SIGKILL, signal 9"):
        pool.run(rank_functions.kill, 1, ranks=2)
    assert len(pool.run(rank_functions.process_id, ranks=2)) == 2


def test_a_rank_that_was_killed_between_jobs_is_replaced(pool: RankPool) -> None:
    before = pool.run(rank_functions.process_id, ranks=2)
    os.kill(before[1], signal.SIGKILL)
    wait_until_gone(before[1])
    assert not set(pool.run(rank_functions.process_id, ranks=2)) & {before[1]}


def test_a_result_that_cannot_be_pickled_is_an_error(pool: RankPool) -> None:
    with pytest.raises(LaunchError, match=r"rank 0: .*pickle"):
        pool.run(rank_functions.return_a_function, ranks=1)


def test_no_rank_outlives_the_pool() -> None:
    start_fork_server(2)
    with RankPool() as pool:
        ranks = pool.run(rank_functions.process_id, ranks=2)
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]


def test_a_worker_of_a_search_ends_when_the_search_is_killed() -> None:
    start_fork_server(1)
    with RankPool() as pool:
        (worker,) = pool.run(rank_functions.start_worker_of_a_search, ranks=1)
        assert Path(f"/proc/{worker}").exists()
    wait_until_gone(worker)


def test_ranks_started_for_gpus_can_initialise_cuda() -> None:
    """torch refuses CUDA in a fork if the parent has queried devices, which importing megatron-core does."""
    start_fork_server(1)
    assert launch(rank_functions.is_cuda_usable_after_imports, ranks=1, start_method="spawn")
    assert not launch(rank_functions.is_cuda_usable_after_imports, ranks=1, start_method="forkserver")


def test_ranks_on_the_cpu_train_without_the_compiler() -> None:
    start_fork_server(1)
    loaded = launch(rank_functions.compiler_modules_after_training, ranks=1)
    assert loaded == []


def test_errors_of_other_processes_keep_their_type() -> None:
    error = pickle.loads(pickle.dumps(LaunchError("rank 1: x")))
    assert re.fullmatch("rank 1: x", str(error))
