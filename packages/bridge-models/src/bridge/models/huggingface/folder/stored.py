"""How a folder stores its tensors: plain, or quantized with scales in tensors of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from bridge.config.errors import Problem
from bridge.models.huggingface.folder.headers import Header, format_tensor

PLAIN_DTYPES = ("BF16", "F16", "F32")
MXFP4_BLOCK = 32
"""Numbers that share a scale, two to a byte."""

FP8_BLOCK = 128
"""Rows and columns of a block, as DeepSeek-V3 stores them."""


class Format(Enum):
    """How the numbers of a tensor are stored."""

    PLAIN = "plain"
    BLOCK_FP8 = "FP8 with a scale for each block"
    MXFP4 = "MXFP4"


@dataclass(slots=True)  # not frozen: see Header
class Stored:
    """A tensor of a folder."""

    shape: tuple[int, ...]
    """The shape without quantization."""

    format: Format
    values: Header
    scales: Header | None = None
    problem: str | None = None
    """Why it cannot be read; None if it can."""

    @property
    def dtype(self) -> str:
        """The precision in which it is written back, as safetensors spells it."""
        return self.values.dtype if self.format is Format.PLAIN else "BF16"


def make_problem(tensor: Stored, message: str) -> Problem:
    """Return a problem of a tensor, with the name and the file that it has in the folder."""
    return Problem(format_tensor(tensor.values.name), message, str(tensor.values.file))


def pair_scales(headers: Mapping[str, Header]) -> dict[str, Stored]:
    """Return the tensors of a folder, each quantized one joined with its scales."""
    stored: dict[str, Stored] = {}
    for name, header in headers.items():
        packed = name.removesuffix("_blocks")
        if packed != name and packed not in headers and (scales := headers.get(f"{packed}_scales")) is not None:
            stored[packed] = _store_mxfp4(header, scales)
        elif (scales := headers.get(f"{name}_scale_inv")) is not None:
            stored[name] = Stored(header.shape, Format.BLOCK_FP8, header, scales, _check_scales(header, scales))
        elif not _is_scale(name, headers):
            problem = None if header.dtype in PLAIN_DTYPES else _explain_dtype(header.dtype)
            stored[name] = Stored(header.shape, Format.PLAIN, header, problem=problem)
    return stored


def _is_scale(name: str, headers: Mapping[str, Header]) -> bool:
    """Return whether a tensor has the scales of another one."""
    if name.endswith("_scale_inv"):
        return name.removesuffix("_scale_inv") in headers
    packed = name.removesuffix("_scales")
    return packed != name and packed not in headers and f"{packed}_blocks" in headers


def _check_scales(values: Header, scales: Header) -> str | None:
    """Return what is wrong with a tensor of FP8 or its scales."""
    blocks = [-(-size // FP8_BLOCK) for size in values.shape]
    is_scaled = values.dtype == "F8_E4M3" and scales.dtype in ("F32", "BF16")
    if is_scaled and len(blocks) == 2 and list(scales.shape) == blocks:
        return None
    return (
        f"expected F8_E4M3 and a scale of F32 or BF16 for each block of {FP8_BLOCK} x {FP8_BLOCK} numbers, got "
        f"{values.dtype} {list(values.shape)} and {scales.dtype} {list(scales.shape)} ({format_tensor(scales.name)})"
    )


def _store_mxfp4(values: Header, scales: Header) -> Stored:
    is_packed = len(values.shape) == 4 and values.shape[3] * 2 == MXFP4_BLOCK and scales.shape == values.shape[:3]
    if is_packed and values.dtype == scales.dtype == "U8":
        experts, rows, blocks, _ = values.shape
        # transformers has them as [expert, input, output]
        return Stored((experts, blocks * MXFP4_BLOCK, rows), Format.MXFP4, values, scales)
    problem = (
        "expected MXFP4, bytes [experts, rows, blocks, 16] and scales [experts, rows, blocks], got "
        f"{values.dtype} {list(values.shape)} and {scales.dtype} {list(scales.shape)} ({format_tensor(scales.name)})"
    )
    return Stored(values.shape, Format.MXFP4, values, scales, problem)


def _explain_dtype(dtype: str) -> str:
    known = ", ".join(PLAIN_DTYPES)
    return (
        f"is stored as {dtype}, which is not read: supported are {known}, FP8 with scales for blocks (DeepSeek-V3) and "
        "MXFP4 (gpt-oss)"
    )
