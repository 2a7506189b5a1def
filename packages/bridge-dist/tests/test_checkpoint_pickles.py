"""A hostile ``.metadata`` leaves nothing changed behind."""

from pathlib import Path

import pytest
import torch.serialization
from torch.distributed.checkpoint.metadata import Metadata

from bridge.dist.checkpoint.pickles import read_metadata
from bridge.dist.errors import CheckpointError


def set_attribute(module: str, name: str, *, attribute: str, then: bytes) -> bytes:
    """Return a pickle that sets an attribute of a global to None, and goes on with ``then``."""
    return f"c{module}\n{name}\n(N(V{attribute}\nNdtb".encode() + then


@pytest.mark.parametrize("then", [b".", b"cos\nsystem\n."], ids=["ends", "is refused"])
@pytest.mark.parametrize(
    ("module", "name", "changed", "attribute"),
    [
        ("torch.distributed.checkpoint.metadata", "Metadata", Metadata, "__eq__"),
        ("torch.distributed.checkpoint.metadata", "Metadata", Metadata, "added"),
        ("pathlib", "PosixPath", Path, "exists"),
        ("torch.serialization", "_get_layout", torch.serialization._get_layout, "cache"),
    ],
)
def test_changes_are_undone(
    module: str, name: str, changed: object, attribute: str, then: bytes, tmp_path: Path
) -> None:
    before = dict(vars(changed))
    (tmp_path / ".metadata").write_bytes(set_attribute(module, name, attribute=attribute, then=then))
    with pytest.raises(CheckpointError, match=r"cannot be read: it (changes|refers to os\.system)"):
        read_metadata(tmp_path)
    assert dict(vars(changed)) == before
