"""Grouped and sequential experts in PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import run_ranks

from bridge.models.backend.experts import ColumnParallelGroupedLinear, RowParallelGroupedLinear
from bridge.models.backend.provider import PyTorchSpecProvider

Transformer = Callable[..., TransformerConfig]


def test_grouped_and_sequential_experts_are_equal() -> None:
    run_ranks(compare_grouped_and_sequential, 1)


def compare_grouped_and_sequential() -> None:
    """Check that both kinds of experts give the same output and gradients from the same weights, on one rank."""
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
    (output, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(output, expected)
    assert len(gradients) == len(expected_gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[sequential_name(name)])
    # Each can load the checkpoint of the other.
    assert checkpoint_parts(one) == checkpoint_parts(other)


def checkpoint_parts(layer: torch.nn.Module) -> list[tuple[str, tuple[int, ...], tuple[int, ...], list[float]]]:
    """Return name, global shape, offset and values of all that a layer writes into a sharded checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state: Any = layer.sharded_state_dict()  # type: ignore[operator]
    apply_factories(state)
    parts = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
    return sorted((part.key, part.global_shape, part.global_offset, part.data.flatten().tolist()) for part in parts)


def initialise_part_of_weight(layer: type[ColumnParallelGroupedLinear]) -> torch.Tensor:
    """Initialise an expert's gated weight, [8, 6] in total, on the CPU of two ranks; return this rank's part."""
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
def test_tensor_parallel_ranks_initialise_parts_of_one_weight(
    layer: type[ColumnParallelGroupedLinear], parts: Any
) -> None:
    whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for found, (rows, columns) in zip(run_ranks(initialise_part_of_weight, 2, layer), parts, strict=True):
        torch.testing.assert_close(found, whole[list(rows)][:, list(columns)])


def initialise_experts(ep: int, grouped: bool) -> dict[int, torch.Tensor]:
    """Initialise experts on the CPU; return the first matrix of this rank's experts by their global number."""
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
    (whole,) = run_ranks(initialise_experts, 1, 1, grouped)
    assert len({expert.sum().item() for expert in whole.values()}) == 4
    parts = run_ranks(initialise_experts, 2, 2, grouped)
    torch.testing.assert_close(parts[0] | parts[1], whole, rtol=0, atol=0)


def sequential_name(name: str) -> str:
    """Convert a name of grouped experts, `experts.linear_fc1.weight3`, to that of sequential experts in Megatron."""
    return re.sub(r"experts\.(linear_fc[12])\.(weight|bias)(\d+)", r"experts.local_experts.\3.\1.\2", name)


@pytest.mark.parametrize("layer", [ColumnParallelGroupedLinear, RowParallelGroupedLinear])
@pytest.mark.parametrize("skip_bias_add", [False, True])
def test_biases_are_added_or_returned(
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
