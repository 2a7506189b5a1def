"""Read parts of tensors from the files of a checkpoint, without running anything that is in them."""

from __future__ import annotations

import math
import pickle
import zipfile
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader, BytesIO, RawIOBase
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from bridge.config.errors import Problem
from bridge.models.errors import WeightsError

Shape = tuple[int, ...]

_STORAGES = {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16}
_LARGEST_DESCRIPTION = 100_000  # bytes; that of a tensor has 200


class _Storage(NamedTuple):
    """The numbers of a tensor in an archive of torch."""

    dtype: torch.dtype
    key: str


class _View(NamedTuple):
    """A tensor in an archive of torch, as its pickle describes it."""

    storage: _Storage
    start: int
    shape: Shape
    strides: Shape


@dataclass(frozen=True, order=True, slots=True)
class _Chunk:
    """A chunk of a tensor: its place in the tensor, and its bytes in a file."""

    offset: Shape
    shape: Shape
    file: str
    start: int
    length: int


class CheckpointReader:
    """The tensors of a checkpoint. The last file stays open until ``close``."""

    def __init__(self, iteration: Path, metadata: Metadata) -> None:
        self._iteration = iteration
        places = {(index.fqn, index.offset): place for index, place in metadata.storage_data.items()}
        self._chunks: dict[str, list[_Chunk]] = {}
        for key, described in metadata.state_dict_metadata.items():
            if isinstance(described, TensorStorageMetadata):
                stored = ((one, places.get((key, one.offsets))) for one in described.chunks)
                self._chunks[key] = sorted(
                    _Chunk(tuple(one.offsets), tuple(one.sizes), place.relative_path, place.offset, place.length)
                    for one, place in stored
                    if place is not None and len(one.offsets) == len(one.sizes) == len(described.size)
                )
        self._opened: tuple[str, BufferedReader] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the last file."""
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """Return a part of a tensor.

        Raises:
            WeightsError: No chunks hold all of it, or one of them is damaged.
        """
        found = list(self._find(key, tuple(offset), tuple(shape)))
        covered = sum(math.prod(high - low for low, high in box) for _, box in found)
        if covered != math.prod(shape):
            message = f"the checkpoint does not have each number from {list(offset)} on once"
            raise WeightsError([Problem(key, message, str(self._iteration))])
        parts = ((box, self._read_chunk(key, chunk, box)) for chunk, box in found)
        if len(found) == 1:
            return next(parts)[1]
        whole: torch.Tensor | None = None
        for box, part in parts:
            if whole is None:
                whole = torch.empty(*shape, dtype=part.dtype)
            whole[tuple(slice(low - at, high - at) for (low, high), at in zip(box, offset, strict=True))] = part
        assert whole is not None
        return whole

    def _find(self, key: str, offset: Shape, shape: Shape) -> Iterator[tuple[_Chunk, list[tuple[int, int]]]]:
        """Yield the chunks that overlap with a part of a tensor, and where."""
        chunks = self._chunks.get(key, [])
        deepest = max((one.shape[0] for one in chunks), default=0)
        first = bisect_left(chunks, offset[0] - deepest + 1, key=lambda one: one.offset[0])
        for chunk in chunks[first:]:
            if chunk.offset[0] >= offset[0] + shape[0]:
                return
            box = [
                (max(mine, theirs), min(mine + size, theirs + length))
                for mine, size, theirs, length in zip(offset, shape, chunk.offset, chunk.shape, strict=True)
            ]
            if all(low < high for low, high in box):
                yield chunk, box

    def _read_chunk(self, key: str, chunk: _Chunk, box: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return a part of a chunk: what lies between its first and its last number is read at once."""
        try:
            view, start = self._describe(chunk)
            low = view.start + sum(
                (first - at) * stride for (first, _), at, stride in zip(box, chunk.offset, view.strides, strict=True)
            )
            shape = [last - first for first, last in box]
            count = 1 + sum((size - 1) * stride for size, stride in zip(shape, view.strides, strict=True))
            item = view.storage.dtype.itemsize
            end = start + (low + count) * item
            if end > chunk.start + chunk.length:
                raise ValueError("its numbers end beyond it")
            numbers = torch.empty(count, dtype=view.storage.dtype)
            file = self._open(chunk.file)
            file.seek(start + low * item)
            if file.readinto(memoryview(numbers.view(torch.uint8).numpy())) != count * item:
                raise ValueError("the file is truncated")
        except Exception as error:  # a broken pickle or archive can raise anything
            message = f"the chunk at {list(chunk.offset)} cannot be read: {error}"
            raise WeightsError([Problem(key, message, str(self._iteration / chunk.file))]) from error
        return numbers.as_strided(shape, view.strides)

    def _describe(self, chunk: _Chunk) -> tuple[_View, int]:
        """Return the tensor in an archive, and the place of its numbers in the file."""
        file = self._open(chunk.file)
        with zipfile.ZipFile(_Section(file, chunk.start, chunk.length)) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            described = archive.getinfo(names["data.pkl"])
            if described.file_size > _LARGEST_DESCRIPTION:
                raise ValueError("it is no tensor")
            view = _Unpickler(BytesIO(archive.read(described))).load()
            if not isinstance(view, _View) or view.shape != chunk.shape:
                raise ValueError(f"it is no tensor of the shape {list(chunk.shape)}")
            numbers = archive.getinfo(names[f"data/{view.storage.key}"])
        if numbers.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed")
        start = chunk.start + numbers.header_offset
        file.seek(start)
        header = file.read(_LOCAL_HEADER)
        lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))  # of the name and extra fields
        return view, start + _LOCAL_HEADER + sum(lengths)

    def _open(self, name: str) -> BufferedReader:
        if self._opened is None or self._opened[0] != name:
            self.close()
            self._opened = name, (self._iteration / name).open("rb")
        return self._opened[1]


_LOCAL_HEADER = 30  # bytes before the name of a member of a zip archive


class _Section(RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        if self._at < 0:
            raise OSError("seek before the start")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data


class _Unpickler(pickle.Unpickler):
    """Unpickles the description of a tensor, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")):
            return _rebuild if name == "_rebuild_tensor_v2" else lambda view, *_: view
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is no tensor of bf16, fp16 or fp32")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("it has an unknown storage")
        return _Storage(dtype, key)


def _rebuild(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> _View:
    """Stand in for ``torch._utils._rebuild_tensor_v2``."""
    numbers = (start, *shape, *strides)
    is_tensor = isinstance(storage, _Storage) and len(shape) == len(strides)
    if not is_tensor or not all(type(one) is int and one >= 0 for one in numbers):
        raise pickle.UnpicklingError("it is no tensor")
    return _View(storage, start, tuple(shape), tuple(strides))
