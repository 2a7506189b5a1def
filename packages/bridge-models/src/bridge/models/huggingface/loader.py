"""Load the weights of Hugging Face folders in `bridge build` and `bridge verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.models.huggingface.folder.folder import open_folder

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import MegatronModule


class FolderLoader:
    """The ``bridge.loaders`` entry point of folders with a config.json."""

    def check(self, folder: Path) -> list[str]:
        """Check that the tensors of a folder are those of its config.json."""
        return open_folder(folder).notes

    def load(self, stages: Sequence[MegatronModule], folder: Path, pg_collection: ProcessGroupCollection) -> None:
        """Load the weights into the stages of this rank."""
        from bridge.models.huggingface.transfer.load import load_weights  # torch, which `check` does without

        load_weights(stages, folder, pg_collection)


LOADER = FolderLoader()
