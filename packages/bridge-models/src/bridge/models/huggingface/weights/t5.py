"""Weights of T5: two stacks of layers, the decoder's with cross attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from bridge.models.huggingface.weights.attention import attention
from bridge.models.huggingface.weights.feed_forward import feed_forward
from bridge.models.huggingface.weights.language_model import OUTPUT
from bridge.models.huggingface.weights.sizes import Sizes
from bridge.models.huggingface.weights.weight import (
    Entry,
    Repetition,
    Weight,
    interleave,
    norm,
    per_token,
    same,
    stack,
    zeros,
)

_EMBEDDING = "shared.weight"
_attention = partial(attention, names=("q", "k", "v", "o"))


def t5(sizes: Sizes) -> Iterator[Entry]:
    """Yield the weights of T5 1.0, whose output layer is tied to the embedding, or 1.1."""
    shape = (sizes.vocabulary, sizes.hidden)
    yield per_token("embedding.word_embeddings.weight", [_EMBEDDING], shape)
    for stack_name in ("encoder", "decoder"):
        yield Repetition(f"{stack_name}.embed_tokens.weight", _EMBEDDING)
    if sizes.tied:
        yield Repetition(OUTPUT, _EMBEDDING)
        yield zeros("lm_head.output_layer.bias", (sizes.vocabulary,))
    else:
        # Version 5 of transformers leaves the output layer of a tied model out, whatever tie_word_embeddings says.
        yield per_token("lm_head.output_layer.weight", [OUTPUT, _EMBEDDING], shape)
    for stack_name, layers in (("encoder", sizes.encoder_layers), ("decoder", sizes.layers)):
        buckets = "relative_attention_bias.weight"
        yield same(
            f"{stack_name}_relative_pos_emb.{buckets}",
            f"{stack_name}.block.0.layer.0.SelfAttention.{buckets}",
            (sizes.buckets, sizes.heads),
        )
        for index in range(layers):
            prefixes = f"{stack_name}.layers.{index}.", f"{stack_name}.block.{index}.layer."
            yield from _layer(sizes, *prefixes, crosses=stack_name == "decoder")
    yield from norm(sizes, "encoder.final_layernorm", "encoder.final_layer_norm")
    # transformers multiplies the input of a tied output layer by hidden_size ** -0.5, Megatron-Core does not.
    factor = sizes.hidden**-0.5 if sizes.tied else 1.0
    yield same("decoder.final_layernorm.weight", "decoder.final_layer_norm.weight", (sizes.hidden,), factor=factor)


def _layer(sizes: Sizes, mcore: str, hf: str, *, crosses: bool) -> Iterator[Entry]:
    yield from norm(sizes, f"{mcore}input_layernorm", f"{hf}0.layer_norm")
    yield from _attention(sizes, f"{mcore}self_attention.", f"{hf}0.SelfAttention.")
    if crosses:
        yield from norm(sizes, f"{mcore}pre_cross_attn_layernorm", f"{hf}1.layer_norm")
        yield from _cross_attention(sizes, f"{mcore}cross_attention.", f"{hf}1.EncDecAttention.")
    last = f"{hf}{2 if crosses else 1}."
    yield from norm(sizes, f"{mcore}pre_mlp_layernorm", f"{last}layer_norm")
    names = ("wi_0", "wi_1", "wo") if sizes.gated else ("", "wi", "wo")
    yield from feed_forward(sizes, f"{mcore}mlp.", f"{last}DenseReluDense.", names=names)


def _cross_attention(sizes: Sizes, mcore: str, hf: str) -> Iterator[Entry]:
    width, hidden = sizes.heads * sizes.channels, sizes.hidden
    yield same(f"{mcore}linear_q.weight", f"{hf}q.weight", (width, hidden))
    parts = interleave(stack([f"{hf}k.weight", f"{hf}v.weight"], (width, hidden)), sizes.heads)
    yield Weight(f"{mcore}linear_kv.weight", (2 * width, hidden), (parts,))
    yield same(f"{mcore}linear_proj.weight", f"{hf}o.weight", (hidden, width))
