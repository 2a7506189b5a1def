"""Recognises documents of other systems and converts them."""

from __future__ import annotations

from bridge.config.foreign import megatron_args
from bridge.config.foreign.run_config import read_run_config
from bridge.config.rewrite import Migration


def convert_foreign(data: object) -> Migration:
    """The document `data` of another system in Bridge's own form; any other document as it is, the very same object.

    A document is the reference's if its `_target_` is, or if it has none and that of its `model` section is; and
    Megatron-LM's if it has no `_target_` and the names of its arguments.

    Raises:
        DocumentError: it describes a model that Bridge has no configuration for.
    """
    return read_run_config(data) or megatron_args.convert_arguments(data) or Migration(data)
