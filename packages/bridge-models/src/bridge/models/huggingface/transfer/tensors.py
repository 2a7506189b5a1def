"""Read regions of a folder's tensors from memory-mapped files, dequantized where they are quantized.

Tensors that are made here name their device: a program may have set another default.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open

from bridge.models.huggingface.folder.headers import Header
from bridge.models.huggingface.folder.stored import FP8_BLOCK, MXFP4_BLOCK, Format, Stored
from bridge.models.huggingface.transfer.layout import ITEM_BYTES
from bridge.models.huggingface.weights.weight import Part

CHUNK = 64 * 2**20
"""Bytes read before the mapped pages are given back, since they count as memory of the process."""


class TensorReader:
    """Regions of the tensors of a folder. The last file stays open until ``close``; a later read opens it again."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None
        self._read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the last file, and with it its mapping."""
        self._path = self._file = None

    def read(self, stored: Stored, part: Part, rows: range, columns: slice) -> torch.Tensor:
        """Return rows of a tensor, [rows, columns, ...] as Megatron-Core orders them.

        Args:
            stored: The tensor.
            part: How it is laid out; ``rows`` are some of its rows.
            rows: Rows of the tensor.
            columns: Columns of each row.

        Returns:
            A view of the file in its precision, or fp32 if the tensor is quantized.
        """
        if stored.format is Format.BLOCK_FP8:
            return self._read_fp8(stored, part, rows, columns)
        if stored.format is Format.MXFP4:
            return self._read_mxfp4(stored, part, rows, columns)
        whole = self._map(stored.values)
        if part.index is not None:
            whole = whole[part.index]
        if part.transposed:
            whole = whole.T
        taken = whole[rows.start : rows.stop : rows.step]
        taken = taken[:, columns] if taken.dim() > 1 else taken
        self._count(taken)
        return taken

    def _read_fp8(self, stored: Stored, part: Part, rows: range, columns: slice) -> torch.Tensor:
        """Multiply each number by the scale of its block, in fp32 as transformers does."""
        assert stored.scales is not None
        values, scales = self._map(stored.values), self._map(stored.scales)
        if part.transposed:
            values, scales = values.T, scales.T
        taken = values[rows.start : rows.stop : rows.step, columns]
        row_blocks = _find_blocks(rows, FP8_BLOCK)
        column_blocks = _find_blocks(range(values.shape[1])[columns], FP8_BLOCK)
        factors = scales[row_blocks.start : row_blocks.stop, column_blocks.start : column_blocks.stop]
        row, column = (torch.arange(size, device="cpu") // FP8_BLOCK for size in values.shape)
        row, column = row[rows.start : rows.stop : rows.step] - row_blocks.start, column[columns] - column_blocks.start
        self._count(taken, factors)
        return taken.float() * factors.float()[row][:, column]

    def _read_mxfp4(self, stored: Stored, part: Part, rows: range, columns: slice) -> torch.Tensor:
        """Look up the number of each half byte and multiply it by its block's power of two."""
        assert stored.scales is not None
        assert part.index is not None
        wanted = range(stored.shape[1])[columns]
        blocks = _find_blocks(wanted, MXFP4_BLOCK)
        place = part.index, slice(rows.start, rows.stop, rows.step), slice(blocks.start, blocks.stop)
        values, exponents = self._map(stored.values)[place], self._map(stored.scales)[place]
        numbers = torch.stack([_FP4[(values & 15).int()], _FP4[(values >> 4).int()]], dim=-1)  # the low half is first
        self._count(values, exponents)
        scaled = torch.ldexp(numbers.flatten(-2), exponents.int().unsqueeze(-1) - _BIAS)
        skipped = blocks.start * MXFP4_BLOCK
        return scaled.flatten(-2)[:, wanted.start - skipped : wanted.stop - skipped]

    def _map(self, header: Header) -> torch.Tensor:
        """Return a whole tensor as a view of its file."""
        if header.file != self._path or self._read >= CHUNK:
            self.close()
            self._file = safe_open(header.file, framework="pt")
            self._path, self._read = header.file, 0
        tensor: torch.Tensor = self._file.get_tensor(header.name)
        return tensor

    def _count(self, *taken: torch.Tensor) -> None:
        self._read += sum(one.numel() * one.element_size() for one in taken)


def count_bytes(stored: Stored, part: Part, rows: range, columns: slice) -> int:
    """Return how many bytes of its file ``TensorReader.read`` needs for the same arguments, scales included."""
    shape = stored.shape if part.index is None else stored.shape[1:]
    shape = shape[::-1] if part.transposed else shape
    taken = range(shape[1])[columns] if len(shape) > 1 else range(1)
    if stored.format is Format.PLAIN:
        return len(rows) * len(taken) * prod(shape[2:]) * ITEM_BYTES[stored.dtype]
    assert stored.scales is not None
    if stored.format is Format.BLOCK_FP8:
        scales = len(_find_blocks(rows, FP8_BLOCK)) * len(_find_blocks(taken, FP8_BLOCK))
        return len(rows) * len(taken) + scales * ITEM_BYTES[stored.scales.dtype]
    return len(rows) * len(_find_blocks(taken, MXFP4_BLOCK)) * (MXFP4_BLOCK // 2 + 1)


def _find_blocks(numbers: range, size: int) -> range:
    """Return the blocks that a range of rows or columns touches."""
    return range(numbers[0] // size, numbers[-1] // size + 1) if numbers else range(0)


_BIAS = 127  # of the exponents
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], device="cpu")
