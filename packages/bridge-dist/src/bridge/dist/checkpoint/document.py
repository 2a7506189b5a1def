"""Read and write the document of the model in a Megatron checkpoint. Importing this module does not import torch."""

from __future__ import annotations

import contextlib
from pathlib import Path

from bridge.config import Document, DocumentError
from bridge.config.canonical import canonicalize
from bridge.config.foreign.run_config import to_run_config
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


def write_documents(document: Document, iteration: Path) -> None:
    """Write the document of a model, and Megatron Bridge's run_config.yaml if megatron.training has such a model."""
    (iteration / DOCUMENT).write_text(document.to_yaml())
    with contextlib.suppress(DocumentError):
        section = to_run_config(canonicalize(document.data)).data
        (iteration / RUN_CONFIG).write_text(Document({"model": section}).to_yaml())
