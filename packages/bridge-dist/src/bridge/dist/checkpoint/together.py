"""Errors of one rank that end the work of all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from bridge.dist.errors import CheckpointError


@contextlib.contextmanager
def raise_together() -> Iterator[list[str]]:
    """Yield a list for problems, and raise those of all ranks on every rank, with whatever went wrong on one of them.

    Collective over all ranks.

    Raises:
        CheckpointError: A rank has a problem.
    """
    problems: list[str] = []
    cause: BaseException | None = None
    try:
        yield problems
    except OSError as error:
        problems.append(f"{error.filename or 'a file of the checkpoint'}: {error.strerror or error}")
    except (CheckpointError, CheckpointingException) as error:
        problems.append(str(error))
    except CheckpointException as error:  # of torch, a BaseException; it read or wrote on this rank alone
        problems += [f"the data cannot be read or written: {failure}" for failure, _ in error.failures.values()]
    except Exception as error:  # the other ranks would wait for this one
        problems.append(f"{type(error).__name__}: {error}")
        cause = error
    if everything := [problem for found in gather(problems) for problem in found]:
        raise CheckpointError("\n".join(dict.fromkeys(everything))) from cause


def gather[T](value: T) -> list[T]:
    """Return the values of all ranks. Collective."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
