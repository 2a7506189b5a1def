"""Write a checkpoint of the format torch_dist, tensor by tensor."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Self

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo  # private; torch 2.6 to 2.15
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

_FILE_BYTES = 5 * 10**9
"""Bytes after which another file is begun."""


class CheckpointWriter:
    """The ``.distcp`` files and ``.metadata`` of one checkpoint.

    torch's own writer (``FileSystemWriter.write_data``, seen in 2.15) keeps all tensors of a file until it is complete.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = 0
        self._file: BinaryIO | None = None
        self._results: list[WriteResult] = []
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._objects: dict[str, BytesStorageMetadata] = {}

    def write_tensor(self, key: str, size: Sequence[int], offset: Sequence[int], values: torch.Tensor) -> None:
        """Write a chunk of a tensor.

        Args:
            key: The name of the tensor.
            size: The shape of the whole tensor.
            offset: The place of the chunk.
            values: The chunk, in the precision of the whole tensor, without other values in its storage.
        """
        described = self._tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=values.dtype), torch.Size(size), [])
        )
        described.chunks.append(ChunkStorageMetadata(torch.Size(offset), values.shape))
        stream = self._open()
        start = stream.tell()
        _save(values, stream)
        self._record(MetadataIndex(key, offset, len(described.chunks) - 1), start, stream.tell() - start)

    def write_objects(self, keys: Sequence[str], value: object) -> None:
        """Write an object once, under several keys."""
        content = io.BytesIO()
        torch.save([value], content)  # in a list, as megatron-core has the objects of all local shards
        stream = self._open()
        start = stream.tell()
        length = stream.write(content.getbuffer())
        for key in keys:
            self._objects[key] = BytesStorageMetadata()
            self._record(MetadataIndex(key), start, length)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:  # after an error
            self._file.close()

    def finish(self) -> None:
        """Complete the files and write ``.metadata``."""
        self._close_file()
        metadata = Metadata({**self._tensors, **self._objects})
        FileSystemWriter(self._folder).finish(metadata, [self._results])

    def _record(self, index: MetadataIndex, start: int, length: int) -> None:
        place = _StorageInfo(self._get_name(), start, length)
        self._results.append(WriteResult(index=index, size_in_bytes=length, storage_data=place))

    def _get_name(self) -> str:
        return f"__0_{self._files}.distcp"

    def _open(self) -> BinaryIO:
        """Return the file to write to."""
        if self._file is not None and self._file.tell() >= _FILE_BYTES:
            self._close_file()
            self._files += 1
        if self._file is None:
            self._file = (self._folder / self._get_name()).open("wb")
        return self._file

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _save(values: torch.Tensor, stream: BinaryIO) -> None:
    """Write a tensor as torch does.

    Raises:
        OSError: It cannot be written. torch 2.15 then fails to complete its archive, and raises that RuntimeError.
    """
    try:
        torch.save(values, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
