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
    # The distributed optimizer reads .grad of shards that are not leaves when it zeroes gradients. That is harmless:
    # only the optimizer sets them.
    "The .grad attribute of a Tensor that is not a leaf",
)
_TORCH_WARNINGS = (
    # Raised when torch 2.15 reads a checkpoint of megatron-core.
    "The argument order of load has been changed",
    "torch.distributed is disabled, unavailable or uninitialized",
    "Please use DTensor instead and we are deprecating ShardedTensor",
)
# Under the CPU runtime its module calls torch in place of the module that raises the warning.
_MODULES = r"megatron\.core\.|torch\.distributed\.checkpoint\.|bridge\.dist\.cpu\.redirect$"
_RECORDS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # Bridge builds models of this class
    # Raised for the default of an option, although the save is synchronous.
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    # Bridge saves to a folder that it made for this checkpoint.
    "megatron.core.dist_checkpointing.serialization": "Overwriting old incomplete / corrupted checkpoint",
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # megatron-core imports it, but Bridge compiles nothing
}


def silence_imports() -> None:
    """Filter out these messages and no others. Packages call this before they import megatron-core."""
    known = "|".join(map(re.escape, _WARNINGS + _TORCH_WARNINGS))
    for kind in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", known, kind, module=_MODULES)
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
