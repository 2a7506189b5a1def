"""Weights of Mamba-2's layers and of hybrid models."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.models.huggingface.weights.attention import attention
from bridge.models.huggingface.weights.experts import experts
from bridge.models.huggingface.weights.feed_forward import feed_forward
from bridge.models.huggingface.weights.language_model import embedding
from bridge.models.huggingface.weights.sizes import Sizes
from bridge.models.huggingface.weights.weight import Block, Entry, norm, same

_CONVOLUTION_WIDTH = 4
"""Megatron-Core 0.19.2 hard-codes ``d_conv`` = 4."""


def mixer(sizes: Sizes, mcore: str, hf: str) -> Iterator[Entry]:
    """Yield the weights of a Mamba-2 layer: both sides project to gate, x, B, C and dt in this order."""
    heads, states = sizes.mamba_heads, 2 * sizes.mamba_groups * sizes.mamba_states
    inner = heads * sizes.mamba_channels
    convolved = inner + states
    yield same(f"{mcore}in_proj.weight", f"{hf}in_proj.weight", (inner + convolved + heads, sizes.hidden))
    yield same(f"{mcore}conv1d_weight", f"{hf}conv1d.weight", (convolved, 1, _CONVOLUTION_WIDTH))
    yield same(f"{mcore}conv1d_bias", f"{hf}conv1d.bias", (convolved,))
    for name in ("dt_bias", "A_log", "D"):
        yield same(f"{mcore}{name}", f"{hf}{name}", (heads,))
    yield from norm(sizes, f"{mcore}norm", f"{hf}norm", inner)
    yield same(f"{mcore}out_proj.weight", f"{hf}out_proj.weight", (sizes.hidden, inner))


_LAYERS: dict[str, tuple[str, str, Block]] = {
    "M": ("norm", "mixer.", mixer),
    "*": ("input_layernorm", "self_attention.", attention),
    "-": ("pre_mlp_layernorm", "mlp.", feed_forward),
    "E": ("pre_mlp_layernorm", "mlp.", experts),
}
"""Kinds of layers of a pattern: Megatron-Core's names of norm and module, and the module's weights."""


def hybrid(sizes: Sizes) -> Iterator[Entry]:
    """Yield the weights of a model whose layers hold one module each."""
    yield from embedding(sizes, "backbone.embeddings.weight")
    for index, kind in enumerate(sizes.pattern):
        mcore, hf = f"decoder.layers.{index}.", f"backbone.layers.{index}."
        name, module, block = _LAYERS[kind]
        yield from norm(sizes, f"{mcore}{name}", f"{hf}norm")
        yield from block(sizes, f"{mcore}{module}", f"{hf}mixer.")
    yield from norm(sizes, "decoder.final_norm", "backbone.norm_f")
