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
    """A text as token ids, shape [length], dtype int64, for a vocabulary of ``vocab_size``."""

    tokens: torch.Tensor
    vocab_size: int

    @classmethod
    def read(cls, path: Path, *, vocab_size: int, tokenizer: Path | None = None) -> Text:
        """Read a file, one token per byte unless there is a tokenizer.

        Args:
            path: The file.
            vocab_size: The vocabulary of the model.
            tokenizer: The tokenizer.json of a Hugging Face folder. It adds no special tokens.

        Raises:
            TrainingError: A file cannot be read, the text is empty, or the vocabulary is too small for it.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise TrainingError(f"cannot read the text {path}: {error.strerror}") from error
        if not content:
            raise TrainingError(f"the text {path} is empty: pass a file with content")
        if tokenizer is not None:
            tokens = _tokenize(content, path, tokenizer)
            if not len(tokens):
                raise TrainingError(f"the text {path} has no tokens: pass a file with more content")
        else:
            tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
        if (largest := int(tokens.max())) >= vocab_size:
            kind = "bytes" if tokenizer is None else "tokens"
            raise TrainingError(
                f"the text {path} has {kind} up to {largest}, but vocab_size is {vocab_size}: "
                f"set vocab_size to at least {BYTE_VALUES if tokenizer is None else largest + 1}"
            )
        return cls(tokens, vocab_size)

    def make_batch(self, first: int, *, size: int, seq_length: int) -> torch.Tensor:
        """Return a global batch, shape [size, seq_length + 1]: inputs and, shifted by one, labels.

        Consecutive samples are consecutive parts of the text, which wraps around at its end. ``first`` is the number of
        the first one.
        """
        starts = torch.arange(first, first + size).mul(seq_length)
        positions = starts[:, None] + torch.arange(seq_length + 1)[None]
        return self.tokens[positions % len(self.tokens)]


def _tokenize(content: bytes, path: Path, tokenizer: Path) -> torch.Tensor:
    from tokenizers import Tokenizer  # an extra of this package

    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise TrainingError(f"the text {path} is not valid UTF-8 at byte {error.start}") from error
    try:
        loaded = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # tokenizers raises Exception itself
        raise TrainingError(f"cannot read the tokenizer {tokenizer}: {error}") from error
    # Files that a training run saved may cut or pad texts to the length of its samples; transformers ignores that too.
    loaded.no_truncation()
    loaded.no_padding()
    return torch.tensor(loaded.encode(text, add_special_tokens=False).ids, dtype=torch.int64)
