"""Weights around the layers: the embedding, the final norm and the output layer."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.models.huggingface.weights.sizes import Sizes
from bridge.models.huggingface.weights.weight import Entry, Repetition, per_token

OUTPUT = "lm_head.weight"


def embedding(sizes: Sizes, tensor: str = "model.embed_tokens.weight") -> Iterator[Entry]:
    """Yield the embedding, and the output layer, which may be tied to it."""
    shape = (sizes.vocabulary, sizes.hidden)
    yield per_token("embedding.word_embeddings.weight", [tensor], shape)
    yield Repetition(OUTPUT, tensor) if sizes.tied else per_token("output_layer.weight", [OUTPUT], shape)
