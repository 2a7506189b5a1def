"""Errors of one rank that end the work of all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from bridge.dist.errors import CheckpointError


def raise_together() -> AbstractContextManager[list[str]]:
    """Yield a list for problems, and raise those of all ranks on every rank, with whatever went wrong on one of them.

    Collective over all ranks.

    Raises:
        CheckpointError: A rank has a problem.
    """
    return share_problems(_describe, lambda problems: CheckpointError("\n".join(problems)))


@contextlib.contextmanager
def share_problems[T](
    describe: Callable[[BaseException], Sequence[T]], make_error: Callable[[list[T]], Exception]
) -> Iterator[list[T]]:
    """Yield a list for problems, and raise the error that is made of those of all ranks on every rank.

    Collective over all ranks.

    Args:
        describe: Returns the problems that an error of any kind on this rank stands for: others would wait for it.
        make_error: Returns the error of all ranks, given each problem once.
    """
    problems: list[T] = []
    cause: BaseException | None = None
    try:
        yield problems
    except (Exception, CheckpointException) as error:
        problems += describe(error)
        cause = error
    if everything := [problem for found in gather(problems) for problem in found]:
        raise make_error(list(dict.fromkeys(everything))) from cause


def _describe(error: BaseException) -> list[str]:
    if isinstance(error, OSError):
        return [f"{error.filename or 'a file of the checkpoint'}: {error.strerror or error}"]
    if isinstance(error, CheckpointError | CheckpointingException):
        return [str(error)]
    if isinstance(error, CheckpointException):  # of torch, a BaseException; it read or wrote on this rank alone
        return [f"the data cannot be read or written: {failure}" for failure, _ in error.failures.values()]
    return [f"{type(error).__name__}: {error}"]


def gather[T](value: T) -> list[T]:
    """Return the values of all ranks. Collective."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
