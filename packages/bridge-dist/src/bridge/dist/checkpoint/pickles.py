"""Read the pickles of a checkpoint without running anything.

``.metadata`` is a plain pickle, and torch 2.15 reads it with ``pickle.load``. The objects in the ``.distcp`` files,
Megatron's common state among them, it reads with ``torch.load(weights_only=False)``.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
from megatron.core.safe_globals import SAFE_GLOBALS
from torch.distributed.checkpoint.filesystem import _StorageInfo  # private; seen in torch 2.6 to 2.15
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.serialization import _get_layout  # private; torch pickles a layout with it

from bridge.dist.checkpoint.folder import METADATA, open_regular
from bridge.dist.errors import CheckpointError

_CLASSES: tuple[type, ...] = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    SavePlan,  # Megatron may keep the plans of all ranks
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    TensorWriteData,
    WriteItem,
    WriteItemType,
    _MEM_FORMAT_ENCODING,
    _StorageInfo,
)
_CHANGEABLE: tuple[Any, ...] = (*_CLASSES, Path, _get_layout)
"""The names whose attributes Python lets a pickle set; ``torch.Size`` and data types refuse it."""

_MISSING = object()
_GLOBALS: dict[tuple[str, str], object] = {
    **{(one.__module__, one.__qualname__): one for one in _CLASSES},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    **{(module, name): Path for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "Path")},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}

_LARGEST_METADATA = 2**30  # bytes; 100 tensors of 1000 ranks take 20 MB


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles the classes of ``torch.distributed.checkpoint`` that describe tensors, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which describes no tensor") from None


def read_metadata(iteration: Path) -> Metadata:
    """Read and check ``.metadata``: which tensors a checkpoint has, and where they are in which file.

    Raises:
        CheckpointError: It cannot be read, refers to anything but tensors in files of this folder, or a file is
            shorter than it says.
    """
    file = iteration / METADATA
    try:
        with open_regular(file, limit=_LARGEST_METADATA) as opened, _keep_globals():
            metadata: object = _MetadataUnpickler(opened).load()
    except Exception as error:  # a broken pickle can raise anything
        raise CheckpointError(f"{file} cannot be read: {error or type(error).__name__}") from None
    try:
        checked = _check_types(metadata)
        _check_files(checked, iteration)
    except (CheckpointError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    return checked


@contextlib.contextmanager
def _keep_globals() -> Iterator[None]:
    """Undo changes of what pickles may name, also after an error: a pickle can set attributes of classes and functions.

    Raises:
        UnpicklingError: There were any.
    """
    before = [dict(vars(one)) for one in _CHANGEABLE]
    changed: list[str] = []
    try:
        yield
    finally:
        for one, attributes in zip(_CHANGEABLE, before, strict=True):
            for name in {**attributes, **vars(one)}:
                if vars(one).get(name, _MISSING) is not attributes.get(name, _MISSING):
                    changed.append(one.__name__)
                    if name in attributes:
                        setattr(one, name, attributes[name])
                    else:
                        delattr(one, name)
    if changed:
        raise pickle.UnpicklingError(f"it changes {', '.join(dict.fromkeys(changed))}")


def _check_types(metadata: object) -> Metadata:
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"it holds a {type(metadata).__name__}, not the metadata of a checkpoint")
    if not isinstance(metadata.state_dict_metadata, dict) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError("it has no list of tensors")
    for name, stored in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(stored, TensorStorageMetadata | BytesStorageMetadata):
            raise CheckpointError(f"{name!r:.80} is described as {type(stored).__name__}")
        if isinstance(stored, TensorStorageMetadata) and not _describes_tensor(stored):
            raise CheckpointError(f"the description of {name!r:.80} is not that of a tensor")
    return metadata


def _describes_tensor(stored: TensorStorageMetadata) -> bool:
    chunks = stored.chunks
    return (
        isinstance(stored.size, torch.Size)
        and isinstance(stored.properties, TensorProperties)
        and isinstance(stored.properties.dtype, torch.dtype)
        and isinstance(chunks, list)
        and all(isinstance(one, ChunkStorageMetadata) for one in chunks)
        and all(isinstance(size, torch.Size) for one in chunks for size in (one.offsets, one.sizes))
    )


def _check_files(metadata: Metadata, iteration: Path) -> None:
    """Check that all bytes are in files of this folder."""
    ends: dict[str, int] = {}
    for index, stored in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(stored, _StorageInfo):
            raise CheckpointError(f"{index!r:.80} is stored as {type(stored).__name__}")
        name, start, length = stored.relative_path, stored.offset, stored.length
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index.fqn} is in {name!r:.80}, which is no file of this folder")
        if type(start) is not int or type(length) is not int or min(start, length) < 0:
            raise CheckpointError(f"{index.fqn} has no place in {name}")
        if getattr(stored, "transform_descriptors", None):
            raise CheckpointError(f"{index.fqn} is compressed, which Megatron does not do")
        ends[name] = max(ends.get(name, 0), start + length)
    for name, end in sorted(ends.items()):
        if not (iteration / name).is_file():
            raise CheckpointError(f"there is no file {name}")
        if (size := (iteration / name).stat().st_size) < end:
            raise CheckpointError(f"{name} must have {end:,} bytes, but has {size:,}: it is truncated")


def load_object(file: Path | IO[bytes], *, name: str) -> Any:
    """Load an object that torch saved: plain data, tensors, and the classes that Megatron lists as safe.

    Args:
        file: The file, or its content.
        name: What to call it in an error.

    Raises:
        CheckpointError: It is damaged, or holds another class.
    """
    try:
        with torch.serialization.safe_globals(cast(list[Any], SAFE_GLOBALS)):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{name} cannot be read: {_explain(error)}") from None


def _explain(error: Exception) -> str:
    """Return one line about an object that torch refused; torch's own text advises to trust the file."""
    if isinstance(error, pickle.UnpicklingError):
        refused = re.search(r"GLOBAL (\S+)", str(error))
        return f"it refers to {refused[1]}, which is not data" if refused else "it is damaged"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_bytes(iteration: Path, stored: Any) -> io.BytesIO:
    """Return the bytes of an object in a file of a checkpoint."""
    with (iteration / stored.relative_path).open("rb") as opened:
        opened.seek(stored.offset)
        return io.BytesIO(opened.read(stored.length))
