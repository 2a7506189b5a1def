"""Let megatron-core load a checkpoint, with readers that run nothing."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import ShardedObject, serialization
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from bridge.dist.checkpoint.folder import METADATA
from bridge.dist.checkpoint.pickles import load_object, read_bytes, read_metadata
from bridge.dist.errors import CheckpointError
from bridge.dist.patch import Replacement, replace_attributes

COMMON_STATE: str = ShardedObject("common_state", None, (1,), (0,)).unique_key
"""The key of what is not split over ranks (megatron-core 0.19); older versions have a file common.pt."""


class Checkpoint:
    """One iteration: where its tensors are, and its common state, both read without running anything."""

    def __init__(self, iteration: Path) -> None:
        """Read the descriptions, not the tensors.

        Raises:
            CheckpointError: They are damaged, or hold anything but data.
        """
        self.iteration = iteration
        self.metadata = read_metadata(iteration)
        self.common = self._read_common()

    def _read_common(self) -> dict[str, Any]:
        file = self.iteration / COMMON_STATE_FNAME
        if file.is_file():
            common = load_object(file, name=str(file))
        else:
            if COMMON_STATE not in self.metadata.state_dict_metadata:
                raise CheckpointError(
                    f"{self.iteration} has neither {COMMON_STATE_FNAME} nor a common state in .metadata"
                )
            common = self.read_object(COMMON_STATE)
            common = common[0] if isinstance(common, list) and common else common
        if not isinstance(common, dict):
            raise CheckpointError(f"the common state of {self.iteration} is a {type(common).__name__}, not a mapping")
        return common

    def read_object(self, key: str) -> Any:
        """Read an object that is not a tensor.

        Raises:
            CheckpointError: It is damaged, or holds anything but data.
        """
        stored = self.metadata.storage_data.get(MetadataIndex(key))
        if stored is None:
            raise CheckpointError(f"{self.iteration / METADATA} has no place of {key}")
        return load_object(read_bytes(self.iteration, stored), name=f"{key} in {self.iteration / stored.relative_path}")

    def get_argument(self, name: str, default: Any = None) -> Any:
        """Return one of the arguments of the run that saved it; ``default`` if it is not known."""
        return getattr(self.common.get("args"), name, default)

    def load(self, state: dict[str, Any]) -> dict[str, Any]:
        """Load a sharded state dict. Collective over all ranks."""
        with self._read_by_us():
            loaded = serialization.load(state, str(self.iteration))
        assert isinstance(loaded, dict)  # with other options it is a tuple
        return loaded

    @contextlib.contextmanager
    def _read_by_us(self) -> Iterator[None]:
        """Replace the functions by which megatron-core 0.19.2 reads pickles."""
        reader = _Reader(self.iteration, self.metadata)
        with replace_attributes(
            Replacement(serialization, "load_common_state_dict", lambda folder: dict(self._read_common())),
            Replacement(strategies, "_get_filesystem_reader", lambda *args, **kwargs: reader),
            Replacement(strategies, "MCoreLoadPlanner", _LoadPlanner),
        ):
            yield


class _Reader(FileSystemReader):
    """Has the checked metadata; the one of torch unpickles them."""

    def __init__(self, iteration: Path, metadata: Metadata) -> None:
        super().__init__(str(iteration))
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata


class _LoadPlanner(strategies.MCoreLoadPlanner):
    """Loads objects as data; the one of megatron-core 0.19.2 runs what is in them."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        self.state_dict[name] = load_object(value, name=f"{name} of the checkpoint")
