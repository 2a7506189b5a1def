"""Filters for warnings and log records of megatron-core and torch that users cannot act on."""

from __future__ import annotations

import logging
import re
import warnings

# Warnings of megatron-core 0.19.2.
_WARNINGS = (
    "Transformer Engine and Apex are not installed",  # PyTorch provides everything that Bridge uses of them
    "Apex is not installed",
    "absl.logging is not installed",
    "full scope is deprecated",  # raised for a default value that the user did not set
    "MimoModelConfig is experimental",  # raised on import, whether or not the class is used
)
_RECORDS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # Bridge builds models of this class
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # megatron-core imports it, but Bridge compiles nothing
}


def silence_imports() -> None:
    """Filter out these messages and no others. Packages call this before they import megatron-core."""
    known = "|".join(map(re.escape, _WARNINGS))
    warnings.filterwarnings("ignore", known, UserWarning, module=r"megatron\.core\.")
    for name, message in _RECORDS.items():
        logging.getLogger(name).addFilter(_MessageFilter(message))


class _MessageFilter(logging.Filter):
    """Drops log records that begin with a message. Equal filters compare equal, so that a logger adds only one."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self._message = message

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._message)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _MessageFilter) and self._message == other._message

    def __hash__(self) -> int:
        return hash(self._message)
