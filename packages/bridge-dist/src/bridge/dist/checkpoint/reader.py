"""Let megatron-core load a checkpoint, with readers that run nothing."""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, serialization
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from bridge.dist.checkpoint.folder import METADATA, TRAIN_STATE
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
        self.content: dict[str, Any] = self._get(self.common, "content_metadata", dict, {})
        """How its state is written, in megatron-core's words."""
        self.step: int = self._get(self.common, "iteration", int, 0)
        self.samples: int = self._get(vars(self._arguments), "consumed_train_samples", int, 0)
        if (file := iteration / TRAIN_STATE).is_file():
            self.step, self.samples = _read_train_state(file)

    def _get(self, values: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
        """Return a value of the common state.

        Raises:
            CheckpointError: It has another type.
        """
        value = values.get(name)
        if value is None:
            return default
        if type(value) is not kind:
            raise CheckpointError(
                f"{name} in the common state of {self.iteration} is {value!r:.80}: expected {kind.__name__}"
            )
        return value

    @property
    def _arguments(self) -> Namespace:
        """The arguments of the run that saved it."""
        arguments: Namespace = self._get(self.common, "args", Namespace, Namespace())
        return arguments

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
        return getattr(self._arguments, name, default)

    def load(self, state: dict[str, Any]) -> dict[str, Any]:
        """Load a sharded state dict. Collective over all ranks."""
        with read_safely(self):
            loaded = serialization.load(state, str(self.iteration))
        assert isinstance(loaded, dict)  # with other options it is a tuple
        return loaded


@contextlib.contextmanager
def read_safely(*checkpoints: Checkpoint) -> Iterator[None]:
    """Let megatron-core 0.19.2 read these checkpoints, and no others, without running what is in their pickles."""
    known = {checkpoint.iteration: checkpoint for checkpoint in checkpoints}

    def load_common(folder: str | Path) -> dict[str, Any]:
        return deepcopy(known[Path(folder)].common)

    def make_reader(folder: str | Path, *args: Any, **kwargs: Any) -> _Reader:
        return _Reader(Path(folder), known[Path(folder)].metadata)

    with replace_attributes(
        Replacement(serialization, "load_common_state_dict", load_common),
        Replacement(dist_checkpointing, "load_common_state_dict", load_common),
        Replacement(strategies, "_get_filesystem_reader", make_reader),
        Replacement(strategies, "MCoreLoadPlanner", _LoadPlanner),
    ):
        yield


def _read_train_state(file: Path) -> tuple[int, int]:
    """Return the steps and samples that Megatron Bridge wrote.

    Raises:
        CheckpointError: It is damaged, or holds anything but data.
    """
    state = load_object(file, name=str(file))
    try:
        return int(state["step"]), int(state["consumed_train_samples"])
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file} is not Megatron Bridge's train state: {error!r:.80}") from None


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
