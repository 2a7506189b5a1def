"""The files of a tokenizer that a checkpoint keeps, so that its weights can be exported with them."""

from __future__ import annotations

import shutil
from pathlib import Path

from bridge.dist.checkpoint.folder import find_iteration

TOKENIZER = "tokenizer"
"""The folder of an iteration with these files."""

CARRIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files of a folder of transformers that belong to its tokenizer and to generation."""

_TEMPLATES = "additional_chat_templates"
"""The folder of the chat templates beside the default one, which have names of the user's."""


def find_tokenizer_folder(weights: Path | None, checkpoint: Path | None) -> Path | None:
    """Return the folder with the files of the tokenizer, given that of the weights or a Megatron checkpoint.

    Raises:
        CheckpointError: The checkpoint has no iteration.
    """
    return weights if checkpoint is None else find_iteration(checkpoint) / TOKENIZER


def carry_files(source: Path, folder: Path) -> None:
    """Copy the files of the tokenizer and of generation that a folder has."""
    templates = sorted(file.name for file in (source / _TEMPLATES).glob("*.jinja"))
    for name in (*CARRIED, *(f"{_TEMPLATES}/{template}" for template in templates)):
        if (source / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
