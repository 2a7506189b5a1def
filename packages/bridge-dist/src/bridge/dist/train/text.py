"""Token batches of a text. The global batch of a step is the same under every layout."""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import torch

from bridge.dist.errors import TrainingError

BYTE_VALUES = 256


@functools.cache  # the list of torch's files is long
def find_default_text() -> Path:
    """Return the path of a built-in sample text: the licence of torch, which every installation has.

    Raises:
        TrainingError: The installed torch has no licence file.
    """
    for file in importlib.metadata.files("torch") or ():
        if file.name.startswith("LICENSE"):
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise TrainingError("the installed torch has no licence file to train on: pass a text with --text FILE")


@dataclass(frozen=True)
class Text:
    """The bytes of a text as token ids, shape [length], dtype int64, for a vocabulary of ``vocab_size``."""

    tokens: torch.Tensor
    vocab_size: int

    @classmethod
    def read(cls, path: Path, *, vocab_size: int) -> Text:
        """Read a file as bytes, one token per byte.

        Raises:
            TrainingError: The file cannot be read, is empty, or the vocabulary is smaller than its largest byte.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise TrainingError(f"cannot read the text {path}: {error.strerror}") from error
        if not content:
            raise TrainingError(f"the text {path} is empty: pass a file with content")
        if max(content) >= vocab_size:
            raise TrainingError(
                f"the text {path} has bytes up to {max(content)}, but vocab_size is {vocab_size}: "
                f"set vocab_size to at least {BYTE_VALUES}"
            )
        return cls(torch.frombuffer(bytearray(content), dtype=torch.uint8).long(), vocab_size)

    def make_batch(self, first: int, *, size: int, seq_length: int) -> torch.Tensor:
        """Return a global batch, shape [size, seq_length + 1]: inputs and, shifted by one, labels.

        Consecutive samples are consecutive parts of the text, which wraps around at its end. ``first`` is the number of
        the first one.
        """
        starts = torch.arange(first, first + size).mul(seq_length)
        positions = starts[:, None] + torch.arange(seq_length + 1)[None]
        return self.tokens[positions % len(self.tokens)]
