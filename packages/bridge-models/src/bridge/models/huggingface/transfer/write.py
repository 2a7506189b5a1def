"""Write regions of tensors into preallocated safetensors files, several processes at once.

Tensors that are made here name their device: a program may have set another default.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Self

import torch

from bridge.models.huggingface.transfer.layout import ITEM_BYTES, FileLayout, Slot
from bridge.models.huggingface.transfer.regions import Region
from bridge.models.huggingface.weights.weight import Part

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorWriter:
    """The files of one folder, each opened when it is first written."""

    def __init__(self, folder: Path, layout: FileLayout) -> None:
        self._folder = folder
        self._layout = layout
        self._files: dict[str, int] = {}
        self.written = 0
        """Bytes written so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def write(self, regions: Sequence[Region], parameter: torch.Tensor) -> None:
        """Write rows of one parameter.

        Args:
            regions: Which rows of ``parameter`` are which rows of which tensors.
            parameter: [rows, ...], in any precision.
        """
        whole: dict[tuple[str, int | None], list[Region]] = {}
        for region in regions:
            whole.setdefault((region.part.tensor, region.part.index), []).append(region)
        for group in whole.values():
            self._write_matrix(group, parameter)

    def close(self) -> None:
        """Write the files to the disk, and close them."""
        descriptors, self._files = list(self._files.values()), {}
        with ExitStack() as stack:
            for descriptor in descriptors:
                stack.callback(os.close, descriptor)
            for descriptor in descriptors:
                os.fsync(descriptor)

    def _write_matrix(self, regions: Sequence[Region], parameter: torch.Tensor) -> None:
        """Write all rows of a parameter that belong to one matrix or vector, at once if they are all of it."""
        part = regions[0].part
        slot = self._layout.slots[part.tensor]
        shape = part.shape[1:] if part.index is not None else part.shape
        start = slot.start + (part.index or 0) * prod(shape) * ITEM_BYTES[slot.dtype]
        values = [_orient(parameter[region.local], part).to(DTYPES[slot.dtype]).cpu() for region in regions]
        if sum(value.numel() for value in values) == prod(shape):
            matrix = torch.empty(shape, dtype=DTYPES[slot.dtype], device="cpu")
            for region, value in zip(regions, values, strict=True):
                matrix[_select(region, part, shape)] = value
            self._put(slot, start, matrix)
            return
        for region, value in zip(regions, values, strict=True):
            self._write_lines(slot, start, shape, _select(region, part, shape), value)

    def _write_lines(
        self, slot: Slot, start: int, shape: tuple[int, ...], selected: tuple[slice, ...], value: torch.Tensor
    ) -> None:
        """Write a part of a matrix: consecutive rows at once where they are whole, else row by row."""
        if len(shape) == 1:
            shape, selected, value = (1, *shape), (slice(None), *selected), value[None]
        rows, columns = (range(size)[one] for size, one in zip(shape[:2], selected, strict=True))
        inner, item = prod(shape[2:]), ITEM_BYTES[slot.dtype]
        width = shape[1] * inner
        if rows.step == 1 and len(columns) == shape[1]:
            self._put(slot, start + rows.start * width * item, value)
            return
        for row, line in zip(rows, value.reshape(len(rows), -1), strict=True):
            place = start + (row * width + columns.start * inner) * item
            if columns.step == 1:
                self._put(slot, place, line)
            else:
                self._put_apart(slot, place, line, step=columns.step)

    def _put(self, slot: Slot, start: int, values: torch.Tensor) -> None:
        """Write numbers that follow each other."""
        self._write_bytes(slot, start, values)
        self.written += values.numel() * values.element_size()

    def _put_apart(self, slot: Slot, start: int, values: torch.Tensor, *, step: int) -> None:
        """Write every ``step``-th number; other ranks write those between them, maybe at the same time."""
        file, item = self._open(slot), values.element_size()
        length = ((len(values) - 1) * step + 1) * item
        try:
            fcntl.lockf(file, fcntl.LOCK_EX, length, start)
        except OSError:  # a file system without locks
            for index, number in enumerate(values):
                self._write_bytes(slot, start + index * step * item, number)
        else:
            line = torch.frombuffer(bytearray(os.pread(file, length, start)), dtype=values.dtype)
            line[::step] = values
            self._write_bytes(slot, start, line)
            fcntl.lockf(file, fcntl.LOCK_UN, length, start)  # closing the file unlocks it, too
        self.written += len(values) * item

    def _write_bytes(self, slot: Slot, start: int, values: torch.Tensor) -> None:
        # as_strided, since a single number may have any stride, with which it is no bytes
        flat = values.contiguous().as_strided((values.numel(),), (1,))
        data = memoryview(flat.view(torch.uint8).numpy())
        while data:  # a write takes 2 GiB at most
            written = os.pwrite(self._open(slot), data, start)
            data, start = data[written:], start + written

    def _open(self, slot: Slot) -> int:
        """Return the file of a tensor."""
        if slot.file not in self._files:
            descriptor = os.open(self._folder / slot.file, os.O_RDWR | os.O_CREAT, 0o666)
            os.ftruncate(descriptor, self._layout.sizes[slot.file])  # every rank, to the same size
            self._files[slot.file] = descriptor
        return self._files[slot.file]


def _orient(rows: torch.Tensor, part: Part) -> torch.Tensor:
    return rows.T if part.transposed else rows


def _select(region: Region, part: Part, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Return the place of a region in a stored matrix or vector."""
    rows = slice(region.rows.start, region.rows.stop, region.rows.step)
    if len(shape) == 1:
        return (rows,)
    return (region.columns, rows) if part.transposed else (rows, region.columns)
