"""Recognize documents of other systems and convert them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge.config.foreign import megatron_args
from bridge.config.foreign.run_config import read_run_config
from bridge.config.migration import Migration


def convert_foreign(data: object) -> Migration:
    """Convert a document of another system to Bridge's form. Any other document is returned as the same object.

    A document comes from megatron.training or Megatron Bridge if its `_target_` is one of their classes, or that of its
    `model` section if the document has none. It comes from Megatron-LM if it has no `_target_` and the names of
    Megatron-LM's arguments.

    Raises:
        DocumentError: Bridge has no configuration for the model.
    """
    return read_run_config(data) or megatron_args.convert_arguments(data) or Migration(data)


def is_huggingface(data: Mapping[str, Any]) -> bool:
    """Return whether a document is the `config.json` of a Hugging Face model, which bridge-models converts."""
    return "model_type" in data and ("architectures" in data or "transformers_version" in data)
