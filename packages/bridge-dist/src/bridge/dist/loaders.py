"""Load weights from a folder by what installed distributions declare.

An entry point of the group `bridge.loaders` has the name of a file, such as `config.json`, and a `Loader` for folders
with that file. Importing this module does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bridge.config import BridgeError
from bridge.dist.errors import LoadError

if TYPE_CHECKING:
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import MegatronModule

GROUP = "bridge.loaders"


class Loader(Protocol):
    """Loads one kind of folder."""

    def check(self, folder: Path) -> list[str]:
        """Check a folder before any rank starts, and return notes for the user.

        Raises:
            BridgeError: It cannot be loaded.
        """

    def load(self, stages: Sequence[MegatronModule], folder: Path, pg_collection: ProcessGroupCollection) -> None:
        """Load the weights of a folder into the stages of this rank, before they are wrapped. Collective.

        Raises:
            BridgeError: They are not those of the model.
        """

    def compute_logits(self, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of the library that the folder comes from, in fp32, [samples, sequence, vocabulary].

        Args:
            folder: The folder.
            tokens: [samples, sequence]; an encoder-decoder gets them on both sides.

        Raises:
            ComparisonError: The library is not installed, or cannot run the model.
        """


def find_loader(folder: Path) -> Loader:
    """Return the loader of a folder.

    Raises:
        LoadError: No installed distribution loads such a folder.
    """
    points = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    for point in points:
        if os.path.lexists(folder / point.name):
            loader: Loader = point.load()
            return loader
    if not os.path.lexists(folder):
        raise LoadError(f"{folder}: no such folder: give one with weights, or a Megatron checkpoint")
    expected = " or ".join(f"a folder with {point.name}" for point in points) or "a folder: pip install bridge-models"
    raise LoadError(
        f"{folder}: there are no weights to load here: expected {expected}, or a Megatron checkpoint, which is the "
        "folder above its iterations; to restore a checkpoint of ModelOpt, set restore_modelopt_state to true"
    )


def check_weights(folder: Path, *, is_file: bool) -> list[str]:
    """Check a folder of weights before any rank starts, and return notes for the user.

    Args:
        folder: The folder.
        is_file: Whether it is FILE of a command, which can also draw weights.

    Raises:
        BridgeError: It cannot be loaded.
    """
    try:
        return find_loader(folder).check(folder)
    except BridgeError as error:
        if not is_file:
            raise
        raise LoadError(f"{error}\nTo draw the weights instead of loading them, give --random-init") from error
