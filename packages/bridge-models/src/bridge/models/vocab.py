"""The size of a vocabulary that is split over ranks."""

from __future__ import annotations

from typing import Protocol

from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.models.errors import ModelConfigError


class HasVocabulary(Protocol):
    """A configuration with a vocabulary; see the fields of ``GPTModelConfig``."""

    vocab_size: int | None
    make_vocab_size_divisible_by: int
    should_pad_vocab: bool
    transformer: TransformerConfig


def padded_vocab_size(config: HasVocabulary) -> int:
    """Return the number of rows of the whole embedding: ``vocab_size``, padded when ``should_pad_vocab``.

    Raises:
        ModelConfigError: ``vocab_size`` is not set.
    """
    if config.vocab_size is None:
        raise ModelConfigError("vocab_size is not set: give the number of tokens of the tokenizer")
    if not config.should_pad_vocab:
        return config.vocab_size
    return pad_vocab_size(
        config.vocab_size,
        make_vocab_size_divisible_by=config.make_vocab_size_divisible_by,
        tensor_model_parallel_size=config.transformer.tensor_model_parallel_size,
    )


def check_vocabulary(config: HasVocabulary) -> None:
    """Check that the vocabulary, padded or not, splits over tensor-parallel ranks.

    Raises:
        ModelConfigError: It does not, or it is not set.
    """
    ranks = config.transformer.tensor_model_parallel_size
    if padded_vocab_size(config) % ranks:
        raise ModelConfigError(
            f"vocab_size {config.vocab_size} does not split over tensor_model_parallel_size {ranks}: "
            "set should_pad_vocab to true"
        )


def pad_vocab_size(vocab_size: int, *, make_vocab_size_divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Round a vocabulary up, so that each tensor-parallel rank's share is a multiple of a number.

    Args:
        vocab_size: Number of tokens.
        make_vocab_size_divisible_by: What each rank's share must be a multiple of.
        tensor_model_parallel_size: Number of ranks that share the vocabulary.

    Returns:
        The smallest multiple of ``make_vocab_size_divisible_by * tensor_model_parallel_size`` that is large enough.

    Raises:
        ModelConfigError: An argument is not positive.
    """
    sizes = {
        "vocab_size": vocab_size,
        "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
        "tensor_model_parallel_size": tensor_model_parallel_size,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ModelConfigError(f"{name} is {size}: set it to at least 1")
    multiple = make_vocab_size_divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple
