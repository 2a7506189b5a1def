"""Changes of checkpoints as somebody would make them who wants to run code or to crash a run."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

COMMON_STATE = "common_state/shard_0_1"


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def rewrite_metadata(iteration: Path, change: Any) -> None:
    metadata = pickle.loads((iteration / ".metadata").read_bytes())
    change(metadata)
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))


def torch_save(value: object, file: Path) -> None:
    import torch

    torch.save(value, file)


def replace_object(iteration: Path, key: str, value: object) -> None:
    """Write another object in place of one of a checkpoint."""
    torch_save(value, iteration / "other.distcp")

    def change(metadata: Any) -> None:
        (stored,) = (stored for index, stored in metadata.storage_data.items() if index.fqn == key)
        stored.relative_path, stored.offset = "other.distcp", 0
        stored.length = (iteration / "other.distcp").stat().st_size

    rewrite_metadata(iteration, change)


def change_common(folder: Path, /, **values: object) -> None:
    """Replace values in the common state of a checkpoint."""
    import torch

    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (stored,) = (stored for index, stored in metadata.storage_data.items() if index.fqn == COMMON_STATE)
    with (folder / stored.relative_path).open("rb") as opened:
        opened.seek(stored.offset)
        (common,) = torch.load(io.BytesIO(opened.read(stored.length)), weights_only=False)
    replace_object(folder, COMMON_STATE, [common | values])
