"""Where the parameters of a model come from. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bridge.config import Document
from bridge.config.documents.folders import is_folder
from bridge.dist.checkpoint.folder import has_modelopt_state, is_checkpoint


@dataclass(frozen=True, kw_only=True)
class Origin:
    """One of these folders; without any of them the parameters are drawn."""

    weights: Path | None = None
    """A folder with weights (``bridge.dist.loaders``)."""

    checkpoint: Path | None = None
    """A Megatron checkpoint, from which training goes on."""

    modelopt_checkpoint: Path | None = None
    """A checkpoint of a model that ModelOpt changed."""


DRAWN = Origin()


def request_restore(document: Document, load: Path | None) -> list[str]:
    """Let a document restore what ModelOpt changed if the folder of --load needs that; return notes for the user.

    A document that sets ``restore_modelopt_state`` is left as it is.

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """
    if load is None or "restore_modelopt_state" in document.data or not has_modelopt_state(load):
        return []
    document.set("restore_modelopt_state", True)
    return ["has a ModelOpt state: restore_modelopt_state is set to true"]


def choose_origin(document: Document, load: Path | None, *, random_init: bool) -> Origin:
    """Return the origin that a command has: the folder of --load, or FILE if that is a folder."""
    folder = load
    if folder is None and is_folder(document.source) and not random_init:
        folder = Path(document.source)
    if folder is None:
        return DRAWN
    if document.data.get("restore_modelopt_state"):
        # FILE of a ModelOpt model has its weights, but not its state.
        return Origin(modelopt_checkpoint=folder) if load is not None else Origin(weights=folder)
    return Origin(checkpoint=folder) if is_checkpoint(folder) else Origin(weights=folder)
