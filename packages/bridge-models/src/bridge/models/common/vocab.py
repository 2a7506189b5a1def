"""The size of a vocabulary that is split over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

from bridge.models.errors import ModelConfigError


def pad_vocab_size(vocab_size: int, *, make_vocab_size_divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Round a vocabulary size up, so that each tensor-parallel rank's part is a multiple of a number.

    Args:
        vocab_size: Number of tokens.
        make_vocab_size_divisible_by: Number of which each rank's part must be a multiple.
        tensor_model_parallel_size: Number of ranks that share the vocabulary.

    Returns:
        The smallest multiple of ``make_vocab_size_divisible_by * tensor_model_parallel_size`` that is at least
        ``vocab_size``.

    Raises:
        ModelConfigError: An argument is less than 1.
    """
    sizes = {
        "vocab_size": vocab_size,
        "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
        "tensor_model_parallel_size": tensor_model_parallel_size,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ModelConfigError(f"{name} must be at least 1, got {size}")
    multiple = make_vocab_size_divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple  # rounds up: `//` rounds down


def padded_vocab_size(model: Any, tensor_model_parallel_size: int) -> int:
    """Return the number of rows of the full embedding: ``vocab_size``, padded if ``should_pad_vocab``.

    Raises:
        ModelConfigError: ``vocab_size`` is not set.
    """
    size: int | None = model.vocab_size
    if size is None:
        raise ModelConfigError("vocab_size is not set: set it to the number of tokens of the tokenizer")
    if not model.should_pad_vocab:
        return size
    return pad_vocab_size(
        size,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        tensor_model_parallel_size=tensor_model_parallel_size,
    )


def find_vocabulary_problem(model: Any, tp: int) -> str | None:
    """Return an error message if the vocabulary is not set or cannot be split over ``tp`` ranks, otherwise None."""
    if model.vocab_size is None:
        return "vocab_size is not set: set it to the number of tokens of the tokenizer"
    if padded_vocab_size(model, tp) % tp:
        return (
            f"vocab_size {model.vocab_size} is not divisible by tensor_model_parallel_size {tp}: "
            "set should_pad_vocab to true"
        )
    return None
