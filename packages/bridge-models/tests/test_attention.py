"""Attention in PyTorch is compared with a direct implementation of its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import run_ranks

from bridge.models.backend.attention import TorchAttention
from bridge.models.errors import UnsupportedError

Transformer = Callable[..., TransformerConfig]


def make_attention(config: TransformerConfig, groups: ProcessGroupCollection, **given: Any) -> TorchAttention:
    given = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self", "attention_dropout": 0.0} | given
    return TorchAttention(config, layer_number=1, pg_collection=groups, **given)


def softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: Callable[[int, int], bool],
    *,
    scale: float,
    sink: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention from its definition, one query of one head at a time.

    Tensors are [sequence, batch, heads, channels].

    The bias is [batch or 1, heads, queries, keys].
    """
    length, batch, heads, _ = query.shape
    shared = heads // key.shape[2]
    rows = []
    for at in range(length):
        of = [other for other in range(len(key)) if allowed(at, other)]
        heads_out = []
        for b in range(batch):
            for head in range(heads):
                scores = torch.stack([query[at, b, head] @ key[o, b, head // shared] * scale for o in of])
                if bias is not None:
                    scores = scores + bias[b % len(bias), head, at, of]
                total = scores.exp().sum() + (0 if sink is None else sink[head].exp())
                values = torch.stack([value[o, b, head // shared] for o in of])
                heads_out.append((scores.exp() / total) @ values)
        rows.append(torch.stack(heads_out).view(batch, -1))
    return torch.stack(rows)


def random_heads(length: int, groups: int, *, channels: int = 8, values: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length * 100 + groups)
    return [
        torch.randn(length, 2, heads, width, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads, width in ((4, channels), (groups, channels), (groups, values))
    ]


def assert_equal_with_gradients(found: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Check that outputs and gradients of all inputs are equal."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(3))
    gradients = [torch.autograd.grad((output * weights).sum(), inputs) for output in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 9), groups=st.sampled_from([1, 2, 4]), values=st.sampled_from([4, 8]))
def test_causal_attention_matches_the_formula(
    pg_collection: ProcessGroupCollection, transformer: Transformer, length: int, groups: int, values: int
) -> None:
    config = transformer(num_query_groups=groups)
    inputs = random_heads(length, groups, values=values)
    found = make_attention(config, pg_collection)(*inputs, None)
    assert_equal_with_gradients(
        found, softmax_attention(*inputs, lambda at, of: of <= at, scale=1 / math.sqrt(8)), inputs
    )


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"window_size": (2, 0)}, lambda at, of: at - 2 <= of <= at),
        ({"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}, lambda at, of: of <= at),
    ],
)
def test_attention_variants_match_the_formula(
    pg_collection: ProcessGroupCollection,
    transformer: Transformer,
    fields: dict[str, Any],
    allowed: Callable[[int, int], bool],
) -> None:
    inputs = random_heads(6, 4)
    found = make_attention(transformer(**fields), pg_collection)(*inputs, None)
    assert_equal_with_gradients(found, softmax_attention(*inputs, allowed, scale=1 / math.sqrt(8)), inputs)


def test_a_sink_takes_its_share_of_the_softmax(pg_collection: ProcessGroupCollection, transformer: Transformer) -> None:
    from bridge.dist.cpu import cpu_runtime

    with cpu_runtime():  # megatron-core creates the sink on the GPU
        layer = make_attention(transformer(softmax_type="learnable"), pg_collection)
    inputs = [part.detach().float().requires_grad_() for part in random_heads(5, 2)]
    sink = layer.softmax_offset
    assert isinstance(sink, torch.nn.Parameter)
    for bias in (None, torch.randn(1, 4, 5, 5, requires_grad=True)):
        found = layer(*inputs, None, attention_bias=bias)
        expected = softmax_attention(*inputs, lambda at, of: of <= at, scale=1 / math.sqrt(8), sink=sink, bias=bias)
        torch.testing.assert_close(found, expected)
        leaves = [*inputs, sink] if bias is None else [*inputs, sink, bias]
        gradients = [torch.autograd.grad(output.sin().sum(), leaves) for output in (found, expected)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.no_mask, AttnMaskType.padding])
@pytest.mark.parametrize("fields", [{}, {"apply_query_key_layer_scaling": True}, {"softmax_scale": 1.0}])
def test_a_bias_is_added_to_the_scaled_scores(
    pg_collection: ProcessGroupCollection,
    transformer: Transformer,
    samples: int,
    mask_type: AttnMaskType,
    fields: dict[str, Any],
) -> None:
    config = transformer(num_query_groups=2, **fields)
    inputs = random_heads(5, 2)
    mask, allowed = None, lambda at, of: mask_type is not AttnMaskType.causal or of <= at
    if mask_type is AttnMaskType.padding:
        mask = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
        mask[..., 3] = True
        allowed = lambda at, of: of != 3  # noqa: E731
    bias = torch.randn(samples, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    layer = make_attention(config, pg_collection, attn_mask_type=mask_type, softmax_scale=config.softmax_scale)
    found = layer(*inputs, mask, attention_bias=bias)
    scale = config.softmax_scale or 1 / math.sqrt(8)
    assert_equal_with_gradients(found, softmax_attention(*inputs, allowed, scale=scale, bias=bias), [*inputs, bias])


def test_a_bias_may_join_sequences_of_unequal_length(
    pg_collection: ProcessGroupCollection, transformer: Transformer
) -> None:
    query, *_ = random_heads(3, 4)
    _, key, value = random_heads(6, 4)
    bias = torch.randn(1, 4, 3, 6, dtype=torch.float64, requires_grad=True)
    layer = make_attention(transformer(), pg_collection, attn_mask_type=AttnMaskType.arbitrary, attention_type="cross")
    found = layer(query, key, value, None, attention_bias=bias)
    expected = softmax_attention(query, key, value, lambda at, of: True, scale=1 / math.sqrt(8), bias=bias)
    assert_equal_with_gradients(found, expected, [query, key, value, bias])


@pytest.mark.parametrize("mask_type", [AttnMaskType.arbitrary, AttnMaskType.padding, AttnMaskType.causal])
def test_a_given_mask_replaces_the_causal_one(
    pg_collection: ProcessGroupCollection, transformer: Transformer, mask_type: AttnMaskType
) -> None:
    inputs = random_heads(6, 4)
    mask = torch.ones(6, 6, dtype=torch.bool).triu(3)[None, None]  # two tokens ahead may be seen
    found = make_attention(transformer(), pg_collection, attn_mask_type=mask_type)(*inputs, mask)
    assert_equal_with_gradients(
        found, softmax_attention(*inputs, lambda at, of: of <= at + 2, scale=1 / math.sqrt(8)), inputs
    )


def test_a_padding_mask_is_combined_with_the_causal_mask(
    pg_collection: ProcessGroupCollection, transformer: Transformer
) -> None:
    inputs = random_heads(6, 4)
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 1] = True
    found = make_attention(transformer(), pg_collection, attn_mask_type=AttnMaskType.padding_causal)(*inputs, mask)
    allowed = softmax_attention(*inputs, lambda at, of: of <= at and of != 1, scale=1 / math.sqrt(8))
    assert_equal_with_gradients(found, allowed, inputs)


def test_queries_after_cached_keys_attend_to_all_of_them(
    pg_collection: ProcessGroupCollection, transformer: Transformer
) -> None:
    query, key, value = random_heads(6, 4)
    layer = make_attention(transformer(), pg_collection)
    torch.testing.assert_close(layer(query[4:], key, value, None), layer(query, key, value, None)[4:])


def test_packed_sequences_are_refused(pg_collection: ProcessGroupCollection, transformer: Transformer) -> None:
    layer = make_attention(transformer(), pg_collection)
    with pytest.raises(UnsupportedError, match="packed sequences"):
        layer(*random_heads(4, 4), None, packed_seq_params=object())


def attend_in_parallel(config: TransformerConfig) -> list[torch.Tensor]:
    """Attend to this rank's pieces of the sequence; return output and gradients."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    from bridge.dist import Layout, create_process_groups

    ranks = torch.distributed.get_world_size()
    groups = create_process_groups(Layout(cp=ranks))
    inputs = [
        # the split of megatron-core's data loaders, which takes [batch, sequence, ...]
        get_batch_on_this_cp_rank({"part": part.detach().transpose(0, 1)}, False, cp_group=groups.cp)["part"]
        .transpose(0, 1)
        .requires_grad_()
        for part in random_heads(4 * ranks, 2)
    ]
    output = make_attention(config, groups)(*inputs, None)
    return [part.detach() for part in (output, *torch.autograd.grad(output.sin().sum(), inputs))]


@pytest.mark.parametrize("fields", [{}, {"window_size": (3, 0)}])
def test_context_parallel_ranks_match_one_process(
    pg_collection: ProcessGroupCollection, transformer: Transformer, fields: dict[str, Any]
) -> None:
    config = transformer(num_query_groups=2, **fields)
    whole = random_heads(8, 2)
    output = make_attention(config, pg_collection)(*whole, None)
    expected = [output, *torch.autograd.grad(output.sin().sum(), whole)]
    config.context_parallel_size = 2
    for rank, found in enumerate(run_ranks(attend_in_parallel, 2, config)):
        mine = [[0, 1, 6, 7], [2, 3, 4, 5]][rank]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other[mine], rtol=1e-9, atol=1e-9)


def attend_in_parallel_with_bias(config: TransformerConfig) -> str:
    """Use an attention bias under context parallelism; return the error message."""
    from bridge.dist import Layout, create_process_groups

    layer = make_attention(config, create_process_groups(Layout(cp=2)))
    try:
        layer(*random_heads(4, 4), None, attention_bias=torch.zeros(1, 4, 4, 4))
    except UnsupportedError as error:
        return str(error)
    return "nothing"


def test_a_bias_under_context_parallelism_is_refused(transformer: Transformer) -> None:
    for said in run_ranks(attend_in_parallel_with_bias, 2, transformer(context_parallel_size=2)):
        assert "does not support an attention bias: set context_parallel_size to 1" in said
