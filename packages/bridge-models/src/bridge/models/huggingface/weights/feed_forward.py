"""Weights of feed-forward layers. Megatron-Core keeps gate and up projection in one matrix, the gate first."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.models.huggingface.weights.sizes import Sizes
from bridge.models.huggingface.weights.weight import Entry, Weight, linear, stack

Names = tuple[str, str, str]
"""The names of gate, up and down projection."""

NAMES: Names = ("gate_proj", "up_proj", "down_proj")


def feed_forward(
    sizes: Sizes, mcore: str, hf: str, *, names: Names = NAMES, width: int | None = None
) -> Iterator[Entry]:
    """Yield the weights of a feed-forward layer, gated or not, with a tensor for each projection."""
    width = width or sizes.feed_forward
    gate, up, down = names
    first = [gate, up] if sizes.gated else [up]
    for kind, columns in (("weight", (sizes.hidden,)), ("bias", ())):
        if kind == "weight" or sizes.biases:
            shape = (width, *columns)
            parts = stack([f"{hf}{name}.{kind}" for name in first], shape)
            yield Weight(f"{mcore}linear_fc1.{kind}", (len(first) * width, *columns), (parts,))
    yield from linear(f"{mcore}linear_fc2", f"{hf}{down}", sizes.hidden, width, bias=sizes.biases)


def fused_feed_forward(
    sizes: Sizes,
    mcore: str,
    hf: str,
    *,
    first: str = "gate_up_proj",
    down: str = "down_proj",
    transposed: bool = False,
) -> Iterator[Entry]:
    """Yield the weights of a feed-forward layer whose first matrix is stored as Megatron-Core's."""
    width = sizes.feed_forward
    rows = 2 * width if sizes.gated else width
    bias = sizes.biases
    yield from linear(f"{mcore}linear_fc1", f"{hf}{first}", rows, sizes.hidden, bias=bias, transposed=transposed)
    yield from linear(f"{mcore}linear_fc2", f"{hf}{down}", sizes.hidden, width, bias=bias, transposed=transposed)
