"""Weights of Llama-like decoders: a family states only what differs."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.models.huggingface.weights.attention import attention as separate_attention
from bridge.models.huggingface.weights.experts import experts as separate_experts
from bridge.models.huggingface.weights.feed_forward import feed_forward as separate_feed_forward
from bridge.models.huggingface.weights.language_model import OUTPUT, embedding
from bridge.models.huggingface.weights.sizes import Sizes
from bridge.models.huggingface.weights.weight import Block, Entry, Repetition, linear, norm

_EMBEDDING = "model.embed_tokens.weight"


def decoder(
    sizes: Sizes,
    *,
    attention: Block = separate_attention,
    feed_forward: Block = separate_feed_forward,
    experts: Block = separate_experts,
) -> Iterator[Entry]:
    """Yield the weights of a Llama-like decoder, with DeepSeek's layers of multi-token prediction if it has any."""

    def layer(index: int, mcore: str) -> Iterator[Entry]:
        hf = f"model.layers.{index}."
        # Layers of multi-token prediction are built like the last layer.
        block = experts if sizes.has_experts(min(index, sizes.layers - 1)) else feed_forward
        yield from norm(sizes, f"{mcore}input_layernorm", f"{hf}input_layernorm")
        yield from attention(sizes, f"{mcore}self_attention.", f"{hf}self_attn.")
        yield from norm(sizes, f"{mcore}pre_mlp_layernorm", f"{hf}post_attention_layernorm")
        yield from block(sizes, f"{mcore}mlp.", f"{hf}mlp.")

    yield from embedding(sizes, _EMBEDDING)
    for index in range(sizes.layers):
        yield from layer(index, f"decoder.layers.{index}.")
    yield from norm(sizes, "decoder.final_layernorm", "model.norm")
    for depth in range(sizes.predictions):
        index, mcore = sizes.layers + depth, f"mtp.layers.{depth}."
        hf = f"model.layers.{index}."
        yield from norm(sizes, f"{mcore}enorm", f"{hf}enorm")
        yield from norm(sizes, f"{mcore}hnorm", f"{hf}hnorm")
        yield from linear(f"{mcore}eh_proj", f"{hf}eh_proj", sizes.hidden, 2 * sizes.hidden, bias=False)
        yield from layer(index, f"{mcore}mtp_model_layer.")
        yield from norm(sizes, f"{mcore}final_layernorm", f"{hf}shared_head.norm")
        head = _EMBEDDING if sizes.tied else OUTPUT
        yield Repetition(f"{hf}embed_tokens.weight", _EMBEDDING, is_written=True)
        yield Repetition(f"{hf}shared_head.head.weight", head, is_written=True)
