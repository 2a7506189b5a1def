"""Let megatron-core write a checkpoint, and end all ranks with the reason if one of them cannot write."""

from __future__ import annotations

import contextlib
import errno
import queue
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.api import CheckpointException

from bridge.dist.checkpoint.partial import MAKE_ROOM, explain_lack_of_space
from bridge.dist.checkpoint.together import gather, raise_together
from bridge.dist.errors import CheckpointError
from bridge.dist.formatting import format_bytes
from bridge.dist.patch import Replacement, replace_attributes


@dataclass(frozen=True, kw_only=True)
class Target:
    """The folder of a checkpoint, the bytes of its tensors on all ranks, and those that were free before writing."""

    folder: Path
    needed: int
    free: int

    def describe_failure(self, error: OSError) -> str:
        """Return what could not be written, why, and what to do."""
        reason = f"{error.filename or self.folder}: cannot be written: {error.strerror or error}"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return reason
        sizes = f"the tensors have {format_bytes(self.needed)}, and {format_bytes(self.free)} were free before"
        return f"{reason}: {sizes}: {MAKE_ROOM}"

    @contextlib.contextmanager
    def explain_failure(self) -> Iterator[None]:
        """Raise the description of an error of the file system in its place."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(self.describe_failure(error)) from error


def measure(state: dict[str, Any], folder: Path) -> Target:
    """Check that the tensors of all ranks fit on the disk. Collective over all ranks.

    Raises:
        CheckpointError: They do not.
    """
    with raise_together():
        free = shutil.disk_usage(folder).free
    parts = [one for one in nested_values(state) if isinstance(one, ShardedTensor | ShardedTensorFactory)]
    tensors = [part.data for part in parts if is_main_replica(part.replica_id)]
    mine: int = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    of_ranks = gather((mine, free))
    target = Target(folder=folder, needed=sum(size for size, _ in of_ranks), free=min(left for _, left in of_ranks))
    if (lack := explain_lack_of_space(target.needed, target.free)) is not None:
        raise CheckpointError(f"{folder} {lack}")
    return target


def write(state: dict[str, Any], target: Target, *, content: dict[str, Any]) -> None:
    """Write the sharded state dicts of all ranks with megatron-core. Collective over all ranks.

    Raises:
        CheckpointError: A rank cannot write.
    """
    failure: CheckpointException | None = None
    with raise_together() as problems, _keep_errors() as errors:
        try:
            serialization.save(state, str(target.folder), content_metadata=content)
        except CheckpointException as error:  # on every rank if one of them has failed, without its reason
            failure = error
        problems += [_describe(error, target) for error in errors]
    with raise_together():
        if failure is not None:
            raise failure


@contextlib.contextmanager
def _keep_errors() -> Iterator[list[Exception]]:
    """Yield a list of what goes wrong when megatron-core 0.19.2 writes on this rank.

    It logs the error on this rank, and tells the others only its class. If the first rank cannot write the metadata,
    the others would wait for it.
    """
    errors: list[Exception] = []
    write_data: Callable[..., Any] = FileSystemWriterAsync.write_preloaded_data

    def write_and_keep(*args: Any, **kwargs: Any) -> Any:
        written = write_data(*args, **kwargs)
        if isinstance(written[1], Exception):
            errors.append(written[1])
        return written

    def keep(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except Exception as error:
                errors.append(error)

        return call

    with replace_attributes(
        # Megatron keeps this queue in a process of its own, for saves in the background. That process imports the main
        # module again, which takes seconds for a program that imports megatron-core.
        Replacement(filesystem_async, "_results_queue", queue.SimpleQueue()),
        Replacement(filesystem_async.logger, "disabled", True),
        Replacement(FileSystemWriterAsync, "write_preloaded_data", staticmethod(write_and_keep)),
        Replacement(FileSystemWriterAsync, "finish", keep(FileSystemWriterAsync.finish)),
        Replacement(serialization, "save_config", keep(serialization.save_config)),
    ):
        yield errors


def _describe(error: BaseException, target: Target) -> str:
    """Return what went wrong. torch raises an error of its own after one of the file system."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return f"{target.folder}: cannot be written: {type(error).__name__}: {error}"
    return target.describe_failure(cause)
