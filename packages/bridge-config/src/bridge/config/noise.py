"""What megatron-core and torch say as they are imported and used, where nothing is to be done about it."""

from __future__ import annotations

import logging
import re
import warnings

# Of megatron-core 0.19.2.
_WARNINGS = (
    "Transformer Engine and Apex are not installed",  # PyTorch has all that is used of them
    "Apex is not installed",
    "absl.logging is not installed",
    "full scope is deprecated",  # the default of the CUDA graphs that nobody asked for
    "MimoModelConfig is experimental",  # imported with all the rest
)
_RECORDS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # the models that Bridge builds are of this class
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # megatron-core imports it, and Bridge compiles nothing
}


def silence() -> None:
    """Keep these messages, and no others, off the terminal: called by the packages that import megatron-core."""
    known = "|".join(map(re.escape, _WARNINGS))
    warnings.filterwarnings("ignore", known, UserWarning, module=r"megatron\.core\.")
    for name, message in _RECORDS.items():
        logging.getLogger(name).addFilter(_MessageFilter(message))


class _MessageFilter(logging.Filter):
    """Drops the records that begin with a message; equal to another of the same, so that a logger has it once."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self._message = message

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._message)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _MessageFilter) and self._message == other._message

    def __hash__(self) -> int:
        return hash(self._message)
