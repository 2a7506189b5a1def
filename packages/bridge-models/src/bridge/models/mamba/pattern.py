"""Split the layer pattern of a hybrid model into pipeline stages, and refuse unsupported kinds of layers."""

from __future__ import annotations

from collections.abc import Iterable

from bridge.config.schema.hybrid_pattern import MEANINGS, STAGE, get_decoder, point_at
from bridge.models.errors import ModelConfigError


def split_pattern(pattern: str, stages: int) -> str:
    """Return the pattern with ``|`` between pipeline stages.

    Stages are in Megatron-Core's order: the first virtual stage of every rank, then the second of every rank. Without
    ``|``, stages get equal numbers of layers. With a single stage, every ``|`` is removed.

    Raises:
        ModelConfigError: The pattern has a different number of stages, or cannot be split equally. The message shows
            where.
    """
    decoder = get_decoder(pattern)
    rest = pattern[len(decoder) :]  # multi-token prediction, behind `/`
    parts = decoder.split(STAGE)
    if stages == 1:
        return "".join(parts) + rest
    if len(parts) == stages:
        return pattern
    if len(parts) > 1:
        # The message points at the first layer of each stage; `|` counts as one place.
        starts = [sum(len(part) + 1 for part in parts[:index]) for index in range(len(parts))]
        raise _make_error(
            f"has {len(parts)} stages, the pipeline has {stages} (pipeline_model_parallel_size x virtual stages): "
            "change one of them, or remove every | for equal stages",
            pattern,
            starts,
        )
    size, remainder = divmod(len(decoder), stages)
    if remainder:
        raise _make_error(
            f"has {len(decoder)} layers, which do not divide into {stages} equal stages: "
            "put | between layers where a stage ends",
            pattern,
            range(size * stages, len(decoder)),
        )
    return STAGE.join(decoder[at : at + size] for at in range(0, len(decoder), size)) + rest


def refuse_layers(pattern: str, symbols: str, reason: str) -> None:
    """Check that a pattern has no layers of the kinds in ``symbols``.

    Raises:
        ModelConfigError: It has some. The message points at them and gives the reason.
    """
    if places := [at for at, symbol in enumerate(pattern) if symbol in symbols]:
        names = " and ".join(f"{MEANINGS[symbol]} ({symbol})" for symbol in symbols if symbol in pattern)
        raise _make_error(f"has layers of {names}: {reason}", pattern, places)


def _make_error(problem: str, pattern: str, places: Iterable[int]) -> ModelConfigError:
    return ModelConfigError(f"hybrid_layer_pattern {point_at(problem, pattern, places)}")
