"""Read and write the document of the model in a Megatron checkpoint. Importing this module does not import torch."""

from __future__ import annotations

import contextlib
from pathlib import Path

from bridge.config import Document, DocumentError, ModelConfig
from bridge.config.canonical import canonicalize
from bridge.config.foreign.names import SET_BY_TRAINING_LOOP
from bridge.config.foreign.run_config import to_run_config
from bridge.dist.checkpoint.folder import DOCUMENT, RUN_CONFIG, find_iteration
from bridge.dist.errors import CheckpointError
from bridge.dist.patch import Replacement, replace_attributes


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
        f"{iteration} has neither {DOCUMENT} nor {RUN_CONFIG}: give the document of the model as FILE and the "
        "checkpoint with --load, or to export-hf with --config FILE"
    )


def describe_model(model: ModelConfig) -> Document:
    """Return the document of a model in training, without what the training loop set for Megatron's schedule."""
    transformer = getattr(model, "transformer", model)
    functions = [name for name in SET_BY_TRAINING_LOOP if getattr(transformer, name, None) is not None]
    with replace_attributes(*(Replacement(transformer, name, None) for name in functions)):
        return Document(model.as_dict())


def write_documents(document: Document, iteration: Path, *, has_optimizer: bool, has_random_states: bool) -> None:
    """Write the document of a model, and Megatron Bridge's run_config.yaml if megatron.training has such a model.

    Megatron Bridge (0.6) looks into it for what a checkpoint has, beside the model.
    """
    (iteration / DOCUMENT).write_text(document.to_yaml())
    with contextlib.suppress(DocumentError):
        section = to_run_config(canonicalize(document.data)).data
        held = {"save_optim": has_optimizer, "save_rng": has_random_states, "fully_parallel_save": True}
        (iteration / RUN_CONFIG).write_text(Document({"model": section, "checkpoint": held}).to_yaml())
