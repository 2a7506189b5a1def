"""The document of the model in a Megatron checkpoint. Importing this module does not import torch."""

from __future__ import annotations

from pathlib import Path

from bridge.config import Document
from bridge.dist.checkpoint.folder import DOCUMENT, RUN_CONFIG, find_iteration
from bridge.dist.errors import CheckpointError


def read_folder(folder: str) -> Document:
    """Return the document of the model in a checkpoint, for `bridge.folders`.

    Raises:
        CheckpointError: The folder has no iteration, or does not describe its model.
        DocumentError: The description is invalid.
    """
    iteration = find_iteration(Path(folder))
    for name in (DOCUMENT, RUN_CONFIG):
        if (iteration / name).is_file():
            document = Document.load(str(iteration / name))
            notes = document.migrate()
            return Document(document.data, folder, notes)
    raise CheckpointError(
        f"{iteration} has neither {DOCUMENT} nor {RUN_CONFIG}: give the document of the model, and the checkpoint with "
        "--load"
    )
