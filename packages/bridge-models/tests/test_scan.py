"""Mamba's operations in PyTorch, compared with the recurrence and with mamba-ssm."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import softplus

from bridge.models.backend.scan import GatedRMSNorm, causal_conv1d, selective_scan


class Sizes(NamedTuple):
    batch: int
    length: int
    groups: int
    heads_per_group: int
    channels: int
    state: int
    chunk_size: int
    starts_from_zero: bool


sizes = st.builds(
    Sizes,
    batch=st.integers(1, 2),
    length=st.integers(1, 40),
    groups=st.integers(1, 3),
    heads_per_group=st.integers(1, 3),
    channels=st.integers(1, 6),
    state=st.integers(1, 8),
    chunk_size=st.integers(1, 17),
    starts_from_zero=st.booleans(),
)

Inputs = dict[str, torch.Tensor]


def draw_inputs(sizes: Sizes, seed: int) -> Inputs:
    """Draw inputs with decay rates from 1 to 16 and time steps around 0.001 to 0.1, as at the start of training."""
    generator = torch.Generator().manual_seed(seed)
    heads = sizes.groups * sizes.heads_per_group
    shapes = {
        "x": (sizes.batch, sizes.length, heads, sizes.channels),
        "dt": (sizes.batch, sizes.length, heads),
        "a": (heads,),
        "b": (sizes.batch, sizes.length, sizes.groups, sizes.state),
        "c": (sizes.batch, sizes.length, sizes.groups, sizes.state),
        "state": (sizes.batch, heads, sizes.channels, sizes.state),
    }
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs["a"] = -(1 + 15 * inputs["a"].sigmoid())
    inputs["dt"] = softplus(2 * inputs["dt"] - 3)
    if sizes.starts_from_zero:
        inputs["state"] = torch.zeros_like(inputs["state"])
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def recurrence(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the recurrence from its definition, one position after the other."""
    x, dt, a, b, c, state = inputs
    heads_per_group = x.shape[2] // b.shape[2]
    b, c = (part.repeat_interleave(heads_per_group, dim=2) for part in (b, c))
    outputs = []
    for at in range(x.shape[1]):
        decay = (dt[:, at] * a).exp()[:, :, None, None]
        state = decay * state + dt[:, at, :, None, None] * x[:, at, :, :, None] * b[:, at, :, None, :]
        outputs.append((state * c[:, at, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), state


def outputs_and_gradients(outputs: tuple[torch.Tensor, torch.Tensor], inputs: Inputs) -> dict[str, torch.Tensor]:
    """Return the outputs, and the gradients of a function of both."""
    y, state = outputs
    gradients = torch.autograd.grad(y.sin().sum() + state.cos().sum(), list(inputs.values()))
    return {"y": y, "last state": state} | {f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}


def relative_difference(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 2**32))
def test_the_scan_equals_the_recurrence(sizes: Sizes, seed: int) -> None:
    inputs = draw_inputs(sizes, seed)
    *sequences, state = inputs.values()
    given_state = None if sizes.starts_from_zero else state
    outputs = selective_scan(*sequences, chunk_size=sizes.chunk_size, initial_state=given_state)
    if given_state is None:
        inputs.pop("state")
    found = outputs_and_gradients(outputs, inputs)
    expected = outputs_and_gradients(recurrence(*sequences, state), inputs)
    for name, value in expected.items():
        assert relative_difference(found[name], value) < (1e-3 if name.startswith("gradient") else 1e-5), name


def test_a_long_sequence_with_fast_decay_has_finite_gradients() -> None:
    inputs = draw_inputs(Sizes(1, 300, 1, 2, 4, 8, 128, starts_from_zero=False), seed=1)
    inputs["dt"] = (inputs["dt"] * 100).detach().requires_grad_()  # without the mask, exponentials would overflow
    *sequences, state = inputs.values()
    found = outputs_and_gradients(selective_scan(*sequences, chunk_size=128, initial_state=state), inputs)
    assert all(value.isfinite().all() for value in found.values())


def saved_elements(length: int, chunk_size: int) -> int:
    """Return the number of elements that a scan saves for the backward pass, without its inputs."""
    inputs = draw_inputs(Sizes(1, length, 1, 2, 4, 8, chunk_size, starts_from_zero=True), seed=2)
    inputs.pop("state")
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if any(tensor is given for given in inputs.values()) else tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        selective_scan(*inputs.values(), chunk_size=chunk_size)
    return kept


def test_the_scan_saves_one_state_per_chunk() -> None:
    state = 2 * 4 * 8
    assert saved_elements(1024, 64) == 16 * state
    assert saved_elements(4096, 64) == 64 * state


def test_a_scan_in_half_precision_computes_in_fp32() -> None:
    inputs = draw_inputs(Sizes(2, 33, 1, 2, 4, 8, 16, starts_from_zero=True), seed=3)
    x, dt, a, b, c, _ = (tensor.detach() for tensor in inputs.values())
    half = x.bfloat16()
    y, state = selective_scan(half, dt, a, b.bfloat16(), c.bfloat16(), chunk_size=16)
    expected, _ = selective_scan(half.float(), dt, a, b.bfloat16().float(), c.bfloat16().float(), chunk_size=16)
    assert y.dtype is torch.bfloat16
    assert state.dtype is torch.float32
    torch.testing.assert_close(y, expected.bfloat16(), rtol=0, atol=0)


def test_the_scan_matches_mamba_ssm() -> None:
    ssd_minimal = pytest.importorskip("mamba_ssm.modules.ssd_minimal")
    x, dt, a, b, c, _ = (
        t.detach() for t in draw_inputs(Sizes(2, 64, 2, 1, 4, 8, 16, starts_from_zero=True), seed=4).values()
    )
    expected, _ = ssd_minimal.ssd_minimal_discrete(x * dt[..., None], dt * a, b, c, block_len=16)
    y, _ = selective_scan(x, dt, a, b, c, chunk_size=16)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_the_convolution_is_causal() -> None:
    generator = torch.Generator().manual_seed(5)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in [(2, 9, 3), (3, 1, 4), (3,)])
    found = causal_conv1d(x, weight, bias)
    for at in range(9):
        seen = range(max(0, at - 3), at + 1)
        expected = bias + sum(weight[:, 0, 3 - (at - place)] * x[:, place] for place in seen)
        torch.testing.assert_close(found[:, at], expected)


def test_the_gated_norm_matches_the_formula() -> None:
    generator = torch.Generator().manual_seed(6)
    x, gate = (torch.randn(2, 5, 12, generator=generator) for _ in range(2))
    norm = GatedRMSNorm(12, eps=1e-5, group_size=4)
    torch.nn.init.normal_(norm.weight, generator=generator)
    gated = x * gate * gate.sigmoid()
    for group in torch.arange(12).chunk(3):
        part = gated[..., group]
        expected = torch.nn.functional.rms_norm(part, (4,), norm.weight[group], eps=1e-5)
        torch.testing.assert_close(norm(x, gate)[..., group], expected)
    torch.testing.assert_close(norm(gated), norm(x, gate))
