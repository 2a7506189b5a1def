"""Where each tensor stands in the safetensors files of a folder that is about to be written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bridge.models.huggingface.folder.headers import SINGLE

SHARD_BYTES = 5 * 10**9
"""Most bytes of a file, as transformers writes them; a larger tensor has a file of its own."""

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Slot:
    """The bytes of one tensor in a file."""

    file: str
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The size of the tensor."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class FileLayout:
    """The files of a folder: their headers, their sizes, and the place of each tensor."""

    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]
    slots: Mapping[str, Slot]

    @property
    def tensor_bytes(self) -> int:
        """The size of all tensors."""
        return sum(slot.bytes for slot in self.slots.values())

    def make_index(self) -> bytes | None:
        """Return the content of the index; None for a single file, which has none."""
        if len(self.headers) == 1:
            return None
        files = {name: slot.file for name, slot in sorted(self.slots.items())}
        return json.dumps({"metadata": {"total_size": self.tensor_bytes}, "weight_map": files}, indent=2).encode()


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]], *, shard_bytes: int = SHARD_BYTES) -> FileLayout:
    """Distribute tensors over files, in their order.

    Args:
        tensors: Name, dtype and shape of each.
        shard_bytes: Most bytes of a file.
    """
    shards: list[list[tuple[str, Slot]]] = [[]]
    filled = 0
    for name, dtype, shape in tensors:
        slot = Slot("", 0, dtype, shape)
        if shards[-1] and filled + slot.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, slot))
        filled += slot.bytes
    headers, sizes, slots = {}, {}, {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard.sort(key=lambda entry: -ITEM_BYTES[entry[1].dtype])  # wide numbers first, so that all are aligned
        described: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, slot in shard:
            described[name] = {
                "dtype": slot.dtype,
                "shape": slot.shape,
                "data_offsets": [end, end + slot.bytes],
            }
            end += slot.bytes
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        headers[file] = len(text).to_bytes(8, "little") + text
        start = len(headers[file])
        for name, slot in shard:
            slots[name] = Slot(file, start, slot.dtype, slot.shape)
            start += slot.bytes
        sizes[file] = start
    return FileLayout(headers, sizes, slots)
