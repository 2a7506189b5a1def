"""Read regions of a folder's tensors from memory-mapped files, dequantized where they are quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bridge.models.huggingface.folder.headers import Header
from bridge.models.huggingface.folder.stored import FP8_BLOCK, Format, Stored
from bridge.models.huggingface.weights.weight import Part

CHUNK = 64 * 2**20
"""Bytes read before the mapped pages are given back, since they count as memory of the process."""


class TensorReader:
    """Regions of the tensors of a folder. The last file stays open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None
        self._read = 0

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
        values, scales = self._map(stored.values), self._map(stored.scales).float()
        if part.transposed:
            values, scales = values.T, scales.T
        taken = values[rows.start : rows.stop : rows.step, columns]
        row = torch.arange(len(values))[rows.start : rows.stop : rows.step] // FP8_BLOCK
        column = torch.arange(values.shape[1])[columns] // FP8_BLOCK
        self._count(taken)
        return taken.float() * scales[row][:, column]

    def _read_mxfp4(self, stored: Stored, part: Part, rows: range, columns: slice) -> torch.Tensor:
        """Look up the number of each half byte and multiply it by its block's power of two."""
        assert stored.scales is not None
        assert part.index is not None
        blocks = self._map(stored.values)[part.index, rows.start : rows.stop : rows.step]
        exponents = self._map(stored.scales)[part.index, rows.start : rows.stop : rows.step].int() - _BIAS
        numbers = torch.stack([_FP4[(blocks & 15).int()], _FP4[(blocks >> 4).int()]], dim=-1)  # the low half is first
        self._count(blocks)
        scaled = torch.ldexp(numbers.flatten(-2), exponents.unsqueeze(-1))
        return scaled.flatten(-2)[:, columns]

    def _map(self, header: Header) -> torch.Tensor:
        """Return a whole tensor as a view of its file."""
        if header.file != self._path or self._read >= CHUNK:
            self._file = None  # closes it, and with it goes the mapping
            self._file = safe_open(header.file, framework="pt")
            self._path, self._read = header.file, 0
        tensor: torch.Tensor = self._file.get_tensor(header.name)
        return tensor

    def _count(self, taken: torch.Tensor) -> None:
        self._read += taken.numel() * taken.element_size()


_BIAS = 127  # of the exponents
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
