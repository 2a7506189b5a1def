"""The layers in PyTorch against formulas and other layers: outputs and gradients."""

from __future__ import annotations

import math
import re
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

from bridge.models.backend import TorchAttention
from bridge.models.backend.experts import ColumnParallelGroupedLinear, RowParallelGroupedLinear
from bridge.models.backend.norms import torch_norm
from bridge.models.backend.provider import PyTorchSpecProvider
from bridge.models.errors import UnsupportedError

Transformer = Callable[..., TransformerConfig]


def attention(config: TransformerConfig, groups: ProcessGroupCollection, **given: Any) -> TorchAttention:
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
    """Attention as its definition says, one query of one head at a time; all [sequence, batch, heads, channels].

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


def check(found: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Outputs and the gradients of all inputs are equal."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(3))
    gradients = [torch.autograd.grad((output * weights).sum(), inputs) for output in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 9), groups=st.sampled_from([1, 2, 4]), values=st.sampled_from([4, 8]))
def test_causal_attention_is_the_formula(
    pg_collection: ProcessGroupCollection, transformer: Transformer, length: int, groups: int, values: int
) -> None:
    config = transformer(num_query_groups=groups)
    inputs = random_heads(length, groups, values=values)
    found = attention(config, pg_collection)(*inputs, None)
    check(found, softmax_attention(*inputs, lambda at, of: of <= at, scale=1 / math.sqrt(8)), inputs)


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"window_size": (2, 0)}, lambda at, of: at - 2 <= of <= at),
        ({"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}, lambda at, of: of <= at),
    ],
)
def test_variants_are_the_formula(
    pg_collection: ProcessGroupCollection,
    transformer: Transformer,
    fields: dict[str, Any],
    allowed: Callable[[int, int], bool],
) -> None:
    inputs = random_heads(6, 4)
    found = attention(transformer(**fields), pg_collection)(*inputs, None)
    check(found, softmax_attention(*inputs, allowed, scale=1 / math.sqrt(8)), inputs)


def test_a_sink_takes_its_share_of_the_softmax(pg_collection: ProcessGroupCollection, transformer: Transformer) -> None:
    from bridge.dist.cpu import cpu_runtime

    with cpu_runtime():  # megatron-core puts the sink on a GPU
        layer = attention(transformer(softmax_type="learnable"), pg_collection)
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
    layer = attention(config, pg_collection, attn_mask_type=mask_type, softmax_scale=config.softmax_scale)
    found = layer(*inputs, mask, attention_bias=bias)
    scale = config.softmax_scale or 1 / math.sqrt(8)
    check(found, softmax_attention(*inputs, allowed, scale=scale, bias=bias), [*inputs, bias])


def test_a_bias_between_sequences_of_unequal_length(
    pg_collection: ProcessGroupCollection, transformer: Transformer
) -> None:
    query, *_ = random_heads(3, 4)
    _, key, value = random_heads(6, 4)
    bias = torch.randn(1, 4, 3, 6, dtype=torch.float64, requires_grad=True)
    layer = attention(transformer(), pg_collection, attn_mask_type=AttnMaskType.arbitrary, attention_type="cross")
    found = layer(query, key, value, None, attention_bias=bias)
    expected = softmax_attention(query, key, value, lambda at, of: True, scale=1 / math.sqrt(8), bias=bias)
    check(found, expected, [query, key, value, bias])


@pytest.mark.parametrize("mask_type", [AttnMaskType.arbitrary, AttnMaskType.padding, AttnMaskType.causal])
def test_a_given_mask_is_the_whole_one(
    pg_collection: ProcessGroupCollection, transformer: Transformer, mask_type: AttnMaskType
) -> None:
    inputs = random_heads(6, 4)
    mask = torch.ones(6, 6, dtype=torch.bool).triu(3)[None, None]  # two tokens ahead may be seen
    found = attention(transformer(), pg_collection, attn_mask_type=mask_type)(*inputs, mask)
    check(found, softmax_attention(*inputs, lambda at, of: of <= at + 2, scale=1 / math.sqrt(8)), inputs)


def test_padding_adds_to_what_is_causal(pg_collection: ProcessGroupCollection, transformer: Transformer) -> None:
    inputs = random_heads(6, 4)
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 1] = True
    found = attention(transformer(), pg_collection, attn_mask_type=AttnMaskType.padding_causal)(*inputs, mask)
    allowed = softmax_attention(*inputs, lambda at, of: of <= at and of != 1, scale=1 / math.sqrt(8))
    check(found, allowed, inputs)


def test_later_queries_see_all_kept_keys(pg_collection: ProcessGroupCollection, transformer: Transformer) -> None:
    query, key, value = random_heads(6, 4)
    layer = attention(transformer(), pg_collection)
    torch.testing.assert_close(layer(query[4:], key, value, None), layer(query, key, value, None)[4:])


def test_packed_sequences_are_refused(pg_collection: ProcessGroupCollection, transformer: Transformer) -> None:
    layer = attention(transformer(), pg_collection)
    with pytest.raises(UnsupportedError, match="packed sequences"):
        layer(*random_heads(4, 4), None, packed_seq_params=object())


def test_an_unknown_norm_is_refused(transformer: Transformer) -> None:
    config = transformer()
    config.normalization = "L2Norm"
    with pytest.raises(UnsupportedError, match=r"'L2Norm' is not known: set one of LayerNorm, RMSNorm"):
        torch_norm(config, 8)


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_norms_are_the_formula(transformer: Transformer, normalization: str, zero_centered: bool) -> None:
    config = transformer(normalization=normalization, layernorm_zero_centered_gamma=zero_centered)
    norm = torch_norm(config, 16, eps=1e-3).double()
    x = torch.randn(3, 16, dtype=torch.float64)
    centered = x - x.mean(-1, keepdim=True) if normalization == "LayerNorm" else x
    normed = centered / (centered.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), normed)
    weights = dict(norm.named_parameters())
    with torch.no_grad():
        for parameter in weights.values():
            parameter.normal_()
    gain = weights["weight"] + 1 if zero_centered else weights["weight"]
    torch.testing.assert_close(norm(x), normed * gain + weights.get("bias", 0))


def attend_in_parallel(config: TransformerConfig) -> list[torch.Tensor]:
    """On each rank: attend to this rank's pieces of the sequence, and return output and gradients."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    from bridge.dist import Layout, create_process_groups

    ranks = torch.distributed.get_world_size()
    groups = create_process_groups(Layout(cp=ranks))
    inputs = [
        # as data loaders deal it out: [batch, sequence, ...]
        get_batch_on_this_cp_rank({"part": part.detach().transpose(0, 1)}, False, cp_group=groups.cp)["part"]
        .transpose(0, 1)
        .requires_grad_()
        for part in random_heads(4 * ranks, 2)
    ]
    output = attention(config, groups)(*inputs, None)
    return [part.detach() for part in (output, *torch.autograd.grad(output.sin().sum(), inputs))]


@pytest.mark.parametrize("fields", [{}, {"window_size": (3, 0)}])
def test_context_parallel_ranks_attend_as_one(
    pg_collection: ProcessGroupCollection, transformer: Transformer, fields: dict[str, Any]
) -> None:
    config = transformer(num_query_groups=2, **fields)
    whole = random_heads(8, 2)
    output = attention(config, pg_collection)(*whole, None)
    expected = [output, *torch.autograd.grad(output.sin().sum(), whole)]
    config.context_parallel_size = 2
    for rank, found in enumerate(run_ranks(attend_in_parallel, 2, config)):
        mine = [[0, 1, 6, 7], [2, 3, 4, 5]][rank]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other[mine], rtol=1e-9, atol=1e-9)


def attend_in_parallel_with_bias(config: TransformerConfig) -> str:
    """On each rank: what is said to an attention bias under context parallelism."""
    from bridge.dist import Layout, create_process_groups

    layer = attention(config, create_process_groups(Layout(cp=2)))
    try:
        layer(*random_heads(4, 4), None, attention_bias=torch.zeros(1, 4, 4, 4))
    except UnsupportedError as error:
        return str(error)
    return "nothing"


def test_a_bias_under_context_parallelism_is_refused(transformer: Transformer) -> None:
    for said in run_ranks(attend_in_parallel_with_bias, 2, transformer(context_parallel_size=2)):
        assert "cannot do an attention bias: set context_parallel_size to 1" in said


def test_grouped_experts_compute_what_single_ones_do() -> None:
    run_ranks(grouped_beside_sequential, 1)


def grouped_beside_sequential() -> None:
    """On one rank: both kinds of experts with the same weights give the same output and gradients."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from bridge.config import Document
    from bridge.dist import Layout, create_process_groups

    groups = create_process_groups(Layout())
    model_parallel_cuda_manual_seed(1)
    layers = []
    for grouped in (True, False):
        document = Document.load("moe-tiny")
        document.set("transformer.num_layers", 1)
        document.set("transformer.moe_grouped_gemm", grouped)
        config = document.config()
        model: Any = config.get_builder_cls()(config).build_model(groups)
        layer = model.decoder.layers[0].mlp
        assert isinstance(layer, MoELayer)
        layers.append(layer)
    one, other = layers
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if "experts.linear" in name:
                parameter.normal_(std=0.1)
            other.get_parameter(sequential_name(name)).copy_(parameter)
    tokens = torch.randn(24, 2, 64)
    results = []
    for layer in layers:
        output, _ = layer(tokens)
        layer.zero_grad()
        output.sin().sum().backward()
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
        results.append((output, gradients))
    (output, gradients), (expected, theirs) = results
    torch.testing.assert_close(output, expected)
    assert len(gradients) == len(theirs)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[sequential_name(name)])
    # A checkpoint of the one is a checkpoint of the other.
    assert parts_in_checkpoint(one) == parts_in_checkpoint(other)


def parts_in_checkpoint(layer: torch.nn.Module) -> list[tuple[str, tuple[int, ...], tuple[int, ...], list[float]]]:
    """What a layer writes into a sharded checkpoint: name and shape of the whole, where the part stands, its values."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state: Any = layer.sharded_state_dict()  # type: ignore[operator]
    apply_factories(state)
    parts = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
    return sorted((part.key, part.global_shape, part.global_offset, part.data.flatten().tolist()) for part in parts)


def part_of_experts(layer: type[ColumnParallelGroupedLinear]) -> torch.Tensor:
    """On each of two ranks: its part of an expert's gated weight, [8, 6] in all, initialised on the CPU."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from bridge.dist import Layout, create_process_groups

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        gated_linear_unit=True,
        tensor_model_parallel_size=2,
        use_cpu_initialization=True,
    )
    torch.manual_seed(1)
    experts = layer(
        1,
        6,
        8,
        config=config,
        init_method=torch.nn.init.normal_,
        bias=False,
        skip_bias_add=False,
        is_expert=True,
        pg_collection=create_process_groups(Layout(tp=2)),
    )
    return experts.get_parameter("weight0").detach()


@pytest.mark.parametrize(
    ("layer", "parts"),
    [
        (ColumnParallelGroupedLinear, [([0, 1, 4, 5], range(6)), ([2, 3, 6, 7], range(6))]),
        (RowParallelGroupedLinear, [(range(8), [0, 1, 2]), (range(8), [3, 4, 5])]),
    ],
)
def test_ranks_initialise_parts_of_one_weight(layer: type[ColumnParallelGroupedLinear], parts: Any) -> None:
    whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for found, (rows, columns) in zip(run_ranks(part_of_experts, 2, layer), parts, strict=True):
        torch.testing.assert_close(found, whole[list(rows)][:, list(columns)])


def experts_of_a_rank(ep: int, grouped: bool) -> dict[int, torch.Tensor]:
    """On each rank of expert parallelism: the first matrix of its experts by their number, initialised on the CPU."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from bridge.dist import Layout, create_process_groups

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        num_moe_experts=4,
        add_bias_linear=False,
        gated_linear_unit=True,
        expert_model_parallel_size=ep,
        use_cpu_initialization=True,
    )
    groups = create_process_groups(Layout(dp=ep, ep=ep))
    torch.manual_seed(1)
    build = PyTorchSpecProvider().grouped_mlp_modules(grouped)
    experts = build(num_local_experts=4 // ep, config=config, pg_collection=groups)
    first = "linear_fc1.weight{}" if grouped else "local_experts.{}.linear_fc1.weight"
    return {
        groups.ep.rank() * (4 // ep) + index: experts.get_parameter(first.format(index)).detach()
        for index in range(4 // ep)
    }


@pytest.mark.parametrize("grouped", [False, True])
def test_ranks_initialise_different_experts_of_one_model(grouped: bool) -> None:
    (whole,) = run_ranks(experts_of_a_rank, 1, 1, grouped)
    assert len({expert.sum().item() for expert in whole.values()}) == 4
    parts = run_ranks(experts_of_a_rank, 2, 2, grouped)
    torch.testing.assert_close(parts[0] | parts[1], whole, rtol=0, atol=0)


def sequential_name(name: str) -> str:
    """`experts.linear_fc1.weight3`, Transformer Engine's name of it, as Megatron calls it in experts one by one."""
    return re.sub(r"experts\.(linear_fc[12])\.(weight|bias)(\d+)", r"experts.local_experts.\3.\1.\2", name)


@pytest.mark.parametrize("layer", [ColumnParallelGroupedLinear, RowParallelGroupedLinear])
@pytest.mark.parametrize("skip_bias_add", [False, True])
def test_biases_are_added_or_handed_out(
    pg_collection: ProcessGroupCollection,
    transformer: Transformer,
    layer: type[ColumnParallelGroupedLinear],
    skip_bias_add: bool,
) -> None:
    experts = layer(
        3,
        4,
        5,
        config=transformer(perform_initialization=False),
        init_method=torch.nn.init.ones_,
        bias=True,
        skip_bias_add=skip_bias_add,
        is_expert=True,
        pg_collection=pg_collection,
    )
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    tokens, counts = torch.randn(6, 4), [4, 0, 2]
    output, biases = experts(tokens, counts)
    weights = dict(experts.named_parameters())
    of = [expert for expert, count in enumerate(counts) for _ in range(count)]
    plain = torch.stack([weights[f"weight{expert}"] @ token for expert, token in zip(of, tokens, strict=True)])
    own = torch.stack([weights[f"bias{expert}"] for expert in range(3)])
    torch.testing.assert_close(output, plain if skip_bias_add else plain + own[of])
    assert (biases is not None) == skip_bias_add
    if biases is not None:
        torch.testing.assert_close(biases, own)
