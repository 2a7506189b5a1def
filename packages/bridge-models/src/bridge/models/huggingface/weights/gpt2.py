"""Weights of GPT-2, which stores matrices as [input, output]."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from bridge.models.huggingface.weights.attention import fused_attention
from bridge.models.huggingface.weights.feed_forward import fused_feed_forward
from bridge.models.huggingface.weights.language_model import embedding
from bridge.models.huggingface.weights.sizes import Sizes
from bridge.models.huggingface.weights.weight import Entry, norm, same

_attention = partial(fused_attention, qkv="c_attn", output="c_proj", transposed=True)
_feed_forward = partial(fused_feed_forward, first="c_fc", down="c_proj", transposed=True)


def gpt2(sizes: Sizes) -> Iterator[Entry]:
    """Yield the weights of GPT-2."""
    yield from embedding(sizes, "transformer.wte.weight")
    positions = (sizes.positions, sizes.hidden)
    yield same("embedding.position_embeddings.weight", "transformer.wpe.weight", positions)
    for index in range(sizes.layers):
        mcore, hf = f"decoder.layers.{index}.", f"transformer.h.{index}."
        yield from norm(sizes, f"{mcore}input_layernorm", f"{hf}ln_1")
        yield from _attention(sizes, f"{mcore}self_attention.", f"{hf}attn.")
        yield from norm(sizes, f"{mcore}pre_mlp_layernorm", f"{hf}ln_2")
        yield from _feed_forward(sizes, f"{mcore}mlp.", f"{hf}mlp.")
    yield from norm(sizes, "decoder.final_layernorm", "transformer.ln_f")
