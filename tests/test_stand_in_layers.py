"""The stand-ins for Transformer Engine's layers: what each keeps, computes and sends, by formulas of its own.

s, b, h are the sequence, the batch and the width of the input of a layer, t is the tensor-parallel size. Values have 2
bytes. The formulas follow from `save_for_backward` in the source of Transformer Engine 2.17.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bridge.dist.cpu import on_meta
from bridge.dist.layout import Layout
from bridge.dist.plan.count.attention import ATTENTION_FLOPS
from bridge.dist.plan.count.collectives import Collectives, map_group_names
from bridge.dist.plan.count.memory import list_weight_workspaces
from bridge.dist.plan.transformer_engine import pytorch as te
from bridge.dist.plan.transformer_engine.common import recipe as recipes
from bridge.dist.plan.virtual_rank.groups import act_as_rank

BF16 = torch.bfloat16
T = 4


class Measured(NamedTuple):
    """Bytes saved for the backward pass without parameters, FLOPs of both passes, and bytes of each collective."""

    kept: int
    flops: tuple[int, int]
    sent: dict[str, int]


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[Any]:
    with on_meta(), act_as_rank(Layout(tp=T, pp=1, dp=1), 0) as groups:
        yield groups


def measure(groups: Any, module: torch.nn.Module, *inputs: Any, recipe: recipes.Recipe | None = None) -> Measured:
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        kept.append(tensor)  # so that no address is used again
        return tensor

    kept: list[torch.Tensor] = []
    collectives, flops = (
        Collectives(map_group_names(groups)),
        FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS),
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), collectives, flops:
        with te.fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
            output = module(*inputs)
        forward = flops.get_total_flops()
        held = [*module.parameters(), *list_weight_workspaces(module)]
        for tensor in held:
            saved.pop(tensor.untyped_storage()._cdata, None)
        kept_bytes = sum(saved.values())
        output.backward(torch.empty_like(output))
    sent = {operation: size for (_, _, operation), size in collectives.calls.size.items()}
    return Measured(kept_bytes, (forward, flops.get_total_flops() - forward), sent)


def make_input(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=BF16, requires_grad=True)


def settings_of(function: Callable[..., None]) -> Callable[..., None]:
    return settings(max_examples=8, deadline=None)(function)


sizes = st.integers(1, 8)
booleans = st.booleans()


@settings_of
@given(s=sizes, b=sizes, h=sizes, o=sizes, sp=booleans, norm=st.sampled_from(["LayerNorm", "RMSNorm"]))
def test_norm_and_column(groups: Any, s: int, b: int, h: int, o: int, sp: bool, norm: str) -> None:
    s, h, o = T * s, 16 * h, T * o
    options: dict[str, Any] = {"sequence_parallel": sp, "tp_group": groups.tp, "tp_size": T, "parallel_mode": "column"}
    layer = te.LayerNormLinear(h, o, normalization=norm, bias=False, params_dtype=BF16, **options)
    part = s // T if sp else s
    found = measure(groups, layer, make_input(part, b, h))
    statistics = 4 * part * b * (2 if norm == "LayerNorm" else 1)
    assert found.kept == 2 * part * b * h + 2 * part * b * h + statistics
    product = 2 * s * b * h * (o // T)
    assert found.flops == (product, 2 * product)
    whole = 2 * s * b * h
    # The input is gathered again in the backward pass.
    assert found.sent == ({"allgather": 2 * whole, "reduce_scatter": whole} if sp else {"allreduce": whole})


@settings_of
@given(s=sizes, b=sizes, h=sizes, o=sizes, sp=booleans)
def test_row(groups: Any, s: int, b: int, h: int, o: int, sp: bool) -> None:
    s, h, o = T * s, T * 8 * h, 16 * o
    options: dict[str, Any] = {"sequence_parallel": sp, "tp_group": groups.tp, "tp_size": T, "parallel_mode": "row"}
    layer = te.Linear(h, o, bias=False, params_dtype=BF16, **options)
    found = measure(groups, layer, make_input(s, b, h // T))
    assert found.kept == 2 * s * b * h // T
    product = 2 * s * b * (h // T) * o
    assert found.flops == (product, 2 * product)
    whole = 2 * s * b * o
    assert found.sent == ({"reduce_scatter": whole, "allgather": whole} if sp else {"allreduce": whole})


@settings_of
@given(s=sizes, b=sizes, h=sizes, bias=booleans)
def test_duplicated(groups: Any, s: int, b: int, h: int, bias: bool) -> None:
    layer = te.Linear(8 * h, 24, bias=bias, params_dtype=BF16, sequence_parallel=True)
    found = measure(groups, layer, make_input(s, b, 8 * h))
    assert found.kept == 2 * s * b * 8 * h
    assert found.sent == {}


STORED: dict[type[recipes.Recipe], Callable[[int], int]] = {
    recipes.DelayedScaling: lambda values: values + 4,
    recipes.Float8CurrentScaling: lambda values: values + 4,
    recipes.Float8BlockScaling: lambda values: values + 4 * values // 128,
    recipes.MXFP8BlockScaling: lambda values: values + values // 32,
}
"""Bytes of values in 8 bits and their scales."""


@pytest.mark.parametrize("recipe", STORED)
@settings_of
@given(s=sizes, b=sizes, h=sizes)
def test_eight_bits(groups: Any, recipe: type[recipes.Recipe], s: int, b: int, h: int) -> None:
    s, h, stored = T * s, 128 * h, STORED[recipe]
    options: dict[str, Any] = {"sequence_parallel": True, "tp_group": groups.tp, "tp_size": T, "params_dtype": BF16}
    column = te.LayerNormLinear(h, T, normalization="RMSNorm", bias=False, parallel_mode="column", **options)
    part = s // T * b
    found = measure(groups, column, make_input(s // T, b, h), True, recipe=recipe())
    assert found.kept == 2 * part * h + 4 * part + stored(part * h)
    assert found.sent["allgather"] == 2 * s * b * h  # a byte per value, twice
    row = te.Linear(T * h, 128, bias=False, parallel_mode="row", **options)
    assert measure(groups, row, make_input(s, b, h), True, recipe=recipe()).kept == stored(s * b * h)
    row.save_original_input = True
    kept = stored(s * b * h) if recipe is recipes.DelayedScaling else 2 * s * b * h
    assert measure(groups, row, make_input(s, b, h), True, recipe=recipe()).kept == kept


@settings_of
@given(s=sizes, b=sizes, heads=sizes, shared=sizes, d=sizes, dv=sizes)
def test_attention(groups: Any, s: int, b: int, heads: int, shared: int, d: int, dv: int) -> None:
    a, g, d, dv = heads * shared, heads, 8 * d, 8 * dv
    query, key, value = make_input(s, b, a, d), make_input(s, b, g, d), make_input(s, b, g, dv)
    found = measure(groups, te.DotProductAttention(a), query, key, value)
    states = 16  # the random state, two numbers of 8 bytes
    assert found.kept == 2 * s * b * (a * d + g * d + g * dv + a * dv) + 4 * b * a * s + states
    product = 2 * b * a * s * s
    assert found.flops == (product * (d + dv), product * (3 * d + 2 * dv))


@settings_of
@given(tokens=st.lists(st.integers(0, 40), min_size=1, max_size=5), h=sizes, o=sizes, pads=booleans)
def test_experts(groups: Any, tokens: list[int], h: int, o: int, pads: bool) -> None:
    h, o = 32 * h, 8 * o
    layer = te.GroupedLinear(len(tokens), h, o, bias=False, params_dtype=BF16)
    rows = make_input(sum(tokens), h)
    found = measure(groups, layer, rows, tokens, True)
    assert found.kept == 2 * sum(tokens) * h
    product = 2 * sum(tokens) * h * o
    assert found.flops == (product, 2 * product)
    recipe = recipes.MXFP8BlockScaling()
    with te.fp8_autocast(fp8_recipe=recipe):
        padded, counts = te.Fp8Padding(len(tokens))(rows, tokens)
    assert [count - 31 <= size <= count and count % 32 == 0 for count, size in zip(counts, tokens, strict=True)]
    assert padded.shape == (sum(counts), h)
    found = measure(groups, layer, padded, counts, True, recipe=recipe)
    assert found.kept == sum(counts) * h * 33 // 32


@settings_of
@given(s=sizes, b=sizes, h=sizes, has_mean=booleans)
def test_norm(groups: Any, s: int, b: int, h: int, has_mean: bool) -> None:
    layer = (te.LayerNorm if has_mean else te.RMSNorm)(8 * h, params_dtype=BF16)
    found = measure(groups, layer, make_input(s, b, 8 * h))
    assert found.kept == 2 * s * b * 8 * h + 4 * s * b * (2 if has_mean else 1)
