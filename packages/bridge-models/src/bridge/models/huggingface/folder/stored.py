"""Tensors as a weight table knows them, and how a folder stores them: plain or quantized, under which names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from bridge.config.errors import Problem
from bridge.models.errors import WeightsError
from bridge.models.huggingface.folder.headers import Header

PLAIN_DTYPES = ("BF16", "F16", "F32")
_MXFP4_BLOCK = 32
"""Numbers that share a scale, two to a byte."""


class Format(Enum):
    """How the numbers of a tensor are stored."""

    PLAIN = "plain"
    BLOCK_FP8 = "FP8 with a scale for each block"
    MXFP4 = "MXFP4"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a folder."""

    shape: tuple[int, ...]
    """The shape without quantization."""

    format: Format
    values: Header
    scales: Header | None = None

    @property
    def dtype(self) -> str:
        """The precision in which it is written back, as safetensors spells it."""
        return self.values.dtype if self.format is Format.PLAIN else "BF16"


def pair_scales(headers: Mapping[str, Header]) -> dict[str, Stored]:
    """Return the tensors of a folder, each quantized one joined with its scales.

    Raises:
        WeightsError: A tensor is stored in a way that is not known.
    """
    stored: dict[str, Stored] = {}
    problems: list[Problem] = []
    for name, header in headers.items():
        if name.endswith(("_scale_inv", "_scales")) and _owner_of_scales(name) in headers:
            continue
        if header.dtype in PLAIN_DTYPES:
            stored[name] = Stored(header.shape, Format.PLAIN, header)
        elif (scales := headers.get(f"{name}_scale_inv")) is not None and header.dtype == "F8_E4M3":
            stored[name] = Stored(header.shape, Format.BLOCK_FP8, header, scales)
            problems += _check_scales(name, header, scales)
        elif (scales := headers.get(f"{name.removesuffix('_blocks')}_scales")) is not None and name.endswith("_blocks"):
            owner = name.removesuffix("_blocks")
            problems += _check_blocks(name, header, scales)
            if len(header.shape) == 4:
                experts, rows, blocks, _ = header.shape
                # transformers has them as [expert, input, output]
                stored[owner] = Stored((experts, blocks * _MXFP4_BLOCK, rows), Format.MXFP4, header, scales)
        else:
            problems.append(Problem(name, _explain_dtype(header.dtype)))
    if problems:
        raise WeightsError(problems)
    return stored


def _owner_of_scales(name: str) -> str:
    if name.endswith("_scale_inv"):
        return name.removesuffix("_scale_inv")
    return f"{name.removesuffix('_scales')}_blocks"


def _check_scales(name: str, values: Header, scales: Header) -> Iterable[Problem]:
    fits = len(values.shape) == len(scales.shape) == 2 and all(scales.shape)
    if not fits or scales.dtype not in ("F32", "BF16") or _block_of(values, scales) is None:
        expected = "expected a matrix of F32 or BF16 with one scale for each block of 128 x 128 numbers"
        yield Problem(f"{name}_scale_inv", f"{expected}, got {scales.dtype} {list(scales.shape)}")


FP8_BLOCK = 128
"""Rows and columns of a block, as DeepSeek-V3 stores them."""


def _block_of(values: Header, scales: Header) -> int | None:
    covers = all(-(-size // FP8_BLOCK) == count for size, count in zip(values.shape, scales.shape, strict=True))
    return FP8_BLOCK if covers else None


def _check_blocks(name: str, values: Header, scales: Header) -> Iterable[Problem]:
    is_mxfp4 = values.dtype == scales.dtype == "U8" and len(values.shape) == 4 and values.shape[3] * 2 == _MXFP4_BLOCK
    if not is_mxfp4 or scales.shape != values.shape[:3]:
        expected = "expected MXFP4: bytes [experts, rows, blocks, 16], and scales [experts, rows, blocks]"
        yield Problem(name, f"{expected}, got {list(values.shape)} and {list(scales.shape)}")


def _explain_dtype(dtype: str) -> str:
    known = ", ".join(PLAIN_DTYPES)
    return (
        f"is stored as {dtype}, which is not read: supported are {known}, FP8 with scales for blocks (DeepSeek-V3) and "
        "MXFP4 (gpt-oss)"
    )


def rename(stored: Mapping[str, Stored], *, base: str, embedding: str) -> tuple[dict[str, Stored], list[str]]:
    """Return the tensors under the names of the model with the output layer, and those outside the language model.

    A folder of a base model has names without the prefix ``base``; a multimodal one has ``language_model`` in them;
    the first versions of BERT and T5 called the parameters of norms ``gamma`` and ``beta``.

    Args:
        stored: The tensors by the names that the folder gives them.
        base: The prefix of the base model within the model with the output layer.
        embedding: The name of the embedding, from which the prefixes are told.
    """
    modern = {_LEGACY.sub(lambda found: _MODERN[found[0]], name): tensor for name, tensor in stored.items()}
    bare = embedding.removeprefix(base)
    if embedding in modern:
        return modern, []
    for prefix, replacement in (
        ("", base),
        (f"language_model.{base}", base),
        (f"{base}language_model.", base),
        ("language_model.", base),
    ):
        if f"{prefix}{bare}" in modern:
            return _replace_prefix(modern, prefix, replacement)
    return modern, []


_LEGACY = re.compile(r"(?<=\.)(gamma|beta)$")
_MODERN = {"gamma": "weight", "beta": "bias"}
_OUTPUT = "lm_head."


def _replace_prefix(stored: Mapping[str, Stored], prefix: str, replacement: str) -> tuple[dict[str, Stored], list[str]]:
    inside, outside = {}, []
    for name, tensor in stored.items():
        output = name.removeprefix("language_model.")
        if output.startswith(_OUTPUT):
            inside[output] = tensor
        elif name.startswith(prefix):
            inside[replacement + name.removeprefix(prefix)] = tensor
        else:
            outside.append(name)
    return inside, outside
