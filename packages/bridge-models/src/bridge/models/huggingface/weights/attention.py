"""Weights of attention. Megatron-Core keeps the queries, keys and values of a query group next to each other."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.models.huggingface.weights.sizes import Sizes
from bridge.models.huggingface.weights.weight import Entry, Part, Weight, interleave, linear, norm, same, whole


def attention(
    sizes: Sizes, mcore: str, hf: str, *, names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
) -> Iterator[Entry]:
    """Yield the weights of attention with separate projections; ``names`` are queries, keys, values and output."""
    queries, keys, values, output = names
    for kind, columns in _kinds(sizes):
        parts = [
            part
            for name, heads in ((queries, sizes.heads), (keys, sizes.groups), (values, sizes.groups))
            for part in whole(f"{hf}{name}.{kind}", (heads * sizes.channels, *columns))
        ]
        yield _join(sizes, f"{mcore}linear_qkv.{kind}", parts, columns)
    yield from linear(
        f"{mcore}linear_proj", f"{hf}{output}", sizes.hidden, sizes.heads * sizes.channels, bias=sizes.biases
    )
    if sizes.norms_queries:
        yield from norm(sizes, f"{mcore}q_layernorm", f"{hf}q_norm", sizes.channels)
        yield from norm(sizes, f"{mcore}k_layernorm", f"{hf}k_norm", sizes.channels)
    if sizes.sinks:
        yield same(f"{mcore}core_attention.softmax_offset", f"{hf}sinks", (sizes.heads,))


def fused_attention(
    sizes: Sizes, mcore: str, hf: str, *, qkv: str = "qkv_proj", output: str = "o_proj", transposed: bool = False
) -> Iterator[Entry]:
    """Yield the weights of attention with all queries, then all keys, then all values in one projection."""
    counts = (sizes.heads, sizes.groups, sizes.groups)
    rows = sum(counts) * sizes.channels
    for kind, columns in _kinds(sizes):
        (fused,) = whole(f"{hf}{qkv}.{kind}", (rows, *columns), transposed=transposed and kind == "weight")
        parts, start = [], 0
        for heads in counts:
            stop = start + heads * sizes.channels
            parts.append(Part(fused.tensor, fused.shape, range(start, stop), transposed=fused.transposed))
            start = stop
        yield _join(sizes, f"{mcore}linear_qkv.{kind}", parts, columns)
    width = sizes.heads * sizes.channels
    yield from linear(
        f"{mcore}linear_proj", f"{hf}{output}", sizes.hidden, width, bias=sizes.biases, transposed=transposed
    )


def latent_attention(sizes: Sizes, mcore: str, hf: str) -> Iterator[Entry]:
    """Yield the weights of DeepSeek's multi-head latent attention."""
    hidden, heads = sizes.hidden, sizes.heads
    queries = heads * (sizes.latent_channels + sizes.position_channels)
    if sizes.query_rank is None:
        yield from linear(f"{mcore}linear_q_proj", f"{hf}q_proj", queries, hidden, bias=False)
    else:
        yield from linear(f"{mcore}linear_q_down_proj", f"{hf}q_a_proj", sizes.query_rank, hidden, bias=False)
        yield from norm(sizes, f"{mcore}q_layernorm", f"{hf}q_a_layernorm", sizes.query_rank)
        yield from linear(f"{mcore}linear_q_up_proj", f"{hf}q_b_proj", queries, sizes.query_rank, bias=False)
    rank, values = sizes.latent_rank, heads * sizes.value_channels
    compressed = rank + sizes.position_channels
    yield from linear(f"{mcore}linear_kv_down_proj", f"{hf}kv_a_proj_with_mqa", compressed, hidden, bias=False)
    yield from norm(sizes, f"{mcore}kv_layernorm", f"{hf}kv_a_layernorm", rank)
    expanded = heads * sizes.latent_channels + values
    yield from linear(f"{mcore}linear_kv_up_proj", f"{hf}kv_b_proj", expanded, rank, bias=False)
    yield from linear(f"{mcore}linear_proj", f"{hf}o_proj", hidden, values, bias=False)


def _kinds(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the parameters of the query, key and value projection, each with its shape after the rows."""
    yield "weight", (sizes.hidden,)
    if sizes.qkv_biases:
        yield "bias", ()


def _join(sizes: Sizes, name: str, parts: list[Part], columns: tuple[int, ...]) -> Weight:
    rows = sum(len(part.rows) for part in parts)
    return Weight(name, (rows, *columns), (interleave(parts, sizes.groups),))
