"""What a folder holds, in numbers: `bridge check-hf` prints them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from math import prod

from bridge.models.huggingface.folder.folder import Folder
from bridge.models.huggingface.folder.headers import Header

_BUFFER = ".router.expert_bias"
"""The ending of the only weights that are buffers in Megatron-Core, which a count of parameters leaves out."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The tensors of one dtype."""

    tensors: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The model in a folder, and how it is stored."""

    model_type: str
    parameters: int
    """Of the whole model in Megatron-Core, without padding."""

    files: int
    tensors: int
    bytes: int
    precisions: dict[str, Precision]
    """By dtype, as safetensors spells it; scales of quantized tensors have their own dtype."""


def summarize(folder: Folder) -> Summary:
    """Count the parameters, tensors and bytes of a folder."""
    headers = [header for stored in folder.stored.values() for header in (stored.values, stored.scales) if header]
    sizes: dict[str, list[int]] = {}
    for header in headers:
        sizes.setdefault(header.dtype, []).append(_count_bytes(header))
    precisions = {dtype: Precision(tensors=len(each), bytes=sum(each)) for dtype, each in sorted(sizes.items())}
    return Summary(
        model_type=folder.model_type,
        parameters=sum(
            prod(weight.shape) for name, (weight, _) in folder.match.weights.items() if not name.endswith(_BUFFER)
        ),
        files=len({header.file for header in headers}),
        tensors=len(headers),
        bytes=sum(precision.bytes for precision in precisions.values()),
        precisions=precisions,
    )


def _count_bytes(header: Header) -> int:
    return prod(header.shape) * _get_bits(header.dtype) // 8


@cache
def _get_bits(dtype: str) -> int:
    """Return the size of a number. Names of dtypes say it: BF16, F8_E4M3, F4; BOOL takes 8."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) if bits else 8
