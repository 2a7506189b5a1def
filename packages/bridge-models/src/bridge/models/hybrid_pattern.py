"""The pattern of a hybrid model: one symbol a layer, ``|`` between pipeline stages.

``M*M-|M*ME`` is a model of two stages: Mamba, attention, Mamba, MLP, then Mamba, attention, Mamba, experts.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from bridge.models.errors import ModelConfigError

MEANINGS = {
    Symbols.MAMBA: "Mamba",
    Symbols.ATTENTION: "attention",
    Symbols.MLP: "MLP",
    Symbols.MOE: "experts",
    Symbols.MLA: "multi-latent attention",
    Symbols.DS_ATTENTION: "sparse attention",
    Symbols.GDN: "gated delta net",
}


def layers_of(pattern: str) -> str:
    """Return the symbols of the decoder's layers, without the borders of stages and multi-token prediction."""
    return _decoder(pattern).replace(Symbols.PIPE, "")


def prediction_depths(pattern: str) -> int:
    """Return how many further tokens the pattern predicts: the parts that ``/`` begins."""
    return pattern.count(Symbols.MTP_SEPARATOR)


def check_symbols(pattern: str) -> None:
    """Check that a pattern consists of layers, and that they go together.

    Raises:
        ModelConfigError: With a picture of the pattern that points at what is wrong.
    """
    if unknown := [at for at, symbol in enumerate(pattern) if symbol not in {*MEANINGS, "|", "/"}]:
        known = ", ".join(f"{symbol} {meaning}" for symbol, meaning in MEANINGS.items())
        raise _error(f"has symbols of no layer; there are {known}, and | between pipeline stages", pattern, unknown)
    if not layers_of(pattern):
        raise _error("has no layers: give at least one", pattern, [0])
    latent = [at for at, symbol in enumerate(pattern) if symbol in (Symbols.MLA, Symbols.DS_ATTENTION)]
    if latent and Symbols.ATTENTION in pattern:
        raise _error("has both usual and latent attention, which Megatron-Core cannot: choose one", pattern, latent)
    decoder, *predictions = pattern.split(Symbols.MTP_SEPARATOR)
    at = len(decoder) + 1
    for part in predictions:
        if part != predictions[0] or not part or Symbols.PIPE in part:
            raise _error(
                "must repeat the same layers, of one stage, after each /", pattern, range(at, at + max(len(part), 1))
            )
        at += len(part) + 1


def check_layers(pattern: str, num_layers: int) -> None:
    """Check the number of layers of a pattern.

    Raises:
        ModelConfigError: With a picture of the pattern that points at the layers too many, or where some lack.
    """
    found = len(layers_of(pattern))
    if found != num_layers:
        at = [place for place, symbol in enumerate(_decoder(pattern)) if symbol != Symbols.PIPE]
        raise _error(
            f"has {found} layers, transformer.num_layers is {num_layers}: change one of them",
            pattern,
            at[num_layers:] or [len(_decoder(pattern))],
        )


def staged(pattern: str, stages: int) -> str:
    """Return a pattern with a border after each pipeline stage but the last.

    The borders of a pattern say how to split a pipeline, in Megatron-Core's order: all first virtual stages of the
    ranks, then all second ones. Without any, stages get equal numbers of layers. In a single stage there is nothing to
    split, so borders go.

    Raises:
        ModelConfigError: With a picture of the pattern, which has another number of stages, or cannot be split equally.
    """
    decoder = _decoder(pattern)
    rest = pattern[len(decoder) :]
    parts = decoder.split(Symbols.PIPE)
    if stages == 1:
        return "".join(parts) + rest
    if len(parts) == stages:
        return pattern
    if len(parts) > 1:
        starts = [sum(len(part) + 1 for part in parts[:index]) for index in range(len(parts))]
        raise _error(
            f"has {len(parts)} stages, the pipeline has {stages} (pipeline_model_parallel_size x virtual stages): "
            "change one of them, or leave out every | for equal stages",
            pattern,
            starts,
        )
    size, remainder = divmod(len(decoder), stages)
    if remainder:
        raise _error(
            f"has {len(decoder)} layers, which do not divide into {stages} equal stages: "
            "put | between the layers where stages shall end",
            pattern,
            range(size * stages, len(decoder)),
        )
    return Symbols.PIPE.join(decoder[at : at + size] for at in range(0, len(decoder), size)) + rest


def refuse_layers(pattern: str, symbols: str, reason: str) -> None:
    """Refuse some kinds of layers.

    Raises:
        ModelConfigError: The pattern has some, with a picture that points at them.
    """
    if found := [at for at, symbol in enumerate(pattern) if symbol in symbols]:
        named = " and ".join(f"{MEANINGS[symbol]} ({symbol})" for symbol in symbols if symbol in pattern)
        raise _error(f"has layers of {named}: {reason}", pattern, found)


def _decoder(pattern: str) -> str:
    return pattern.split(Symbols.MTP_SEPARATOR)[0]


def _error(problem: str, pattern: str, places: Iterable[int]) -> ModelConfigError:
    marked = set(places)
    arrows = "".join("^" if at in marked else " " for at in range(max(marked) + 1))
    return ModelConfigError(f"hybrid_layer_pattern {problem}\n  {pattern}\n  {arrows}")
