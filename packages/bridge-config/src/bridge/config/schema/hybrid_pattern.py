"""Layer patterns of hybrid models: one symbol per layer, ``|`` between pipeline stages, ``/`` before each MTP depth.

``M*M-|M*ME`` has two stages: Mamba, attention, Mamba, MLP; and Mamba, attention, Mamba, experts.
"""

from __future__ import annotations

from collections.abc import Iterable

# Source: class Symbols of megatron.core.models.hybrid.hybrid_layer_allocation, megatron-core 0.19.2.
MAMBA, ATTENTION, MLP, EXPERTS, LATENT_ATTENTION, SPARSE_ATTENTION, DELTA_NET = "M", "*", "-", "E", "+", "D", "G"
STAGE, PREDICTION = "|", "/"
MAX_LAYERS = 10_000
"""Upper bound on the symbols of a pattern, and on the layers of a model without one, whose pattern is written out.

A bad document must not exhaust memory."""

MEANINGS = {
    MAMBA: "Mamba",
    ATTENTION: "attention",
    MLP: "MLP",
    EXPERTS: "experts",
    LATENT_ATTENTION: "multi-latent attention",
    SPARSE_ATTENTION: "sparse attention",
    DELTA_NET: "gated delta net",
}


def get_decoder(pattern: str) -> str:
    """Return the decoder part of a pattern, before the MTP depths, including its stage separators."""
    return pattern.split(PREDICTION)[0]


def get_layers(pattern: str) -> str:
    """Return the symbols of the decoder's layers, without stage separators and MTP depths."""
    return get_decoder(pattern).replace(STAGE, "")


def count_prediction_depths(pattern: str) -> int:
    """Return the number of MTP depths: each ``/`` begins one."""
    return pattern.count(PREDICTION)


def find_problem(pattern: str, num_layers: int) -> str | None:
    """Check a pattern for a decoder of ``num_layers`` layers.

    Returns:
        The message about the first problem, usually with arrows below the symbols concerned; None if the pattern is
        valid.
    """
    if len(pattern) > MAX_LAYERS:
        return f"must have at most {MAX_LAYERS} symbols, got {len(pattern)}"
    if unknown := [at for at, symbol in enumerate(pattern) if symbol not in {*MEANINGS, STAGE, PREDICTION}]:
        known = ", ".join(f"{symbol} {meaning}" for symbol, meaning in MEANINGS.items())
        return point_at(f"has unknown symbols; use {known}, and | between pipeline stages", pattern, unknown)
    if not get_layers(pattern):
        return point_at("has no layers: add at least one, or set it to null for Mamba layers only", pattern, [0])
    latent = [at for at, symbol in enumerate(pattern) if symbol in (LATENT_ATTENTION, SPARSE_ATTENTION)]
    if latent and ATTENTION in pattern:
        return point_at(
            "mixes plain and latent attention, which Megatron-Core does not support: choose one", pattern, latent
        )
    decoder, *predictions = pattern.split(PREDICTION)
    at = len(decoder) + 1
    for part in predictions:
        if part != predictions[0] or not part or STAGE in part:
            places = range(at, at + max(len(part), 1))
            return point_at("must repeat the same layers after each /, without |", pattern, places)
        at += len(part) + 1
    return _check_layer_count(pattern, num_layers)


def _check_layer_count(pattern: str, num_layers: int) -> str | None:
    found = len(get_layers(pattern))
    if found == num_layers:
        return None
    places = [place for place, symbol in enumerate(get_decoder(pattern)) if symbol != STAGE]
    return point_at(
        f"has {found} layers, but transformer.num_layers = {num_layers}: change one of them",
        pattern,
        places[num_layers:] or [len(get_decoder(pattern))],
    )


def point_at(problem: str, pattern: str, places: Iterable[int]) -> str:
    """Return ``problem`` followed by the pattern, with an arrow below each index in ``places``."""
    marked = set(places)
    arrows = "".join("^" if at in marked else " " for at in range(max(marked) + 1))
    return f"{problem}\n  {pattern}\n  {arrows}"
