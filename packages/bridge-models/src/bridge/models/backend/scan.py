"""Mamba-2's operations in plain PyTorch: the selective scan, the causal convolution, the gated norm.

The scan is the state-space duality of "Transformers are SSMs" (Dao and Gu, 2024, section 6). The sequence is cut into
chunks, each is computed with matrix products, and a state is passed from one to the next. The backward pass computes
each chunk again, from the states between chunks. Besides inputs and outputs, memory holds one chunk and one state per
chunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv1d, pad, silu


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    *,
    chunk_size: int,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the recurrence ``state = exp(dt a) state + dt x b``, ``y = state c`` at every position of a sequence.

    It is computed in fp32, regardless of the precision of the inputs.

    Args:
        x: [batch, sequence, heads, channels].
        dt: Step sizes, not negative, [batch, sequence, heads].
        a: Decay rates, negative, [heads].
        b: Weights of the input to the state, [batch, sequence, groups, state]; a group serves heads / groups heads.
        c: Weights of the output from the state, shaped like ``b``.
        chunk_size: Length of a chunk. It affects speed and memory, not the result; the last chunk may be shorter.
        initial_state: [batch, heads, channels, state]; None for zeros.

    Returns:
        y, shaped and typed like ``x``, and the state after the last position, in fp32.
    """
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[-1], dtype=torch.float32)
    y, state = _SelectiveScan.apply(x, dt, a, b, c, initial_state, chunk_size)
    return y, state


class _SelectiveScan(torch.autograd.Function):
    """The scan over chunks; the backward pass computes each chunk again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        initial_state: torch.Tensor,
        chunk_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.empty_like(x)
        state = initial_state.float()
        states = []
        for chunk in _split_into_chunks(x.shape[1], chunk_size):
            states.append(state)
            y[:, chunk], state = _scan_chunk(x[:, chunk], dt[:, chunk], a, b[:, chunk], c[:, chunk], state)
        ctx.save_for_backward(x, dt, a, b, c, torch.stack(states) if states else initial_state[None])
        ctx.chunk_size = chunk_size
        ctx.state_dtype = initial_state.dtype
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor, grad_state: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, dt, a, b, c, states = ctx.saved_tensors
        grad_x, grad_dt, grad_b, grad_c = (torch.empty_like(tensor) for tensor in (x, dt, b, c))
        grad_a = torch.zeros_like(a, dtype=torch.float32)
        for chunk, state in reversed(list(zip(_split_into_chunks(x.shape[1], ctx.chunk_size), states, strict=True))):
            inputs = [x[:, chunk], dt[:, chunk], a, b[:, chunk], c[:, chunk], state]
            with torch.enable_grad():
                inputs = [tensor.detach().requires_grad_() for tensor in inputs]
                outputs = _scan_chunk(*inputs)
            of_chunk = torch.autograd.grad(outputs, inputs, (grad_y[:, chunk], grad_state))
            grad_x[:, chunk], grad_dt[:, chunk], of_a, grad_b[:, chunk], grad_c[:, chunk], grad_state = of_chunk
            grad_a += of_a
        return grad_x, grad_dt, grad_a.to(a.dtype), grad_b, grad_c, grad_state.to(ctx.state_dtype), None


def _split_into_chunks(length: int, chunk_size: int) -> list[slice]:
    return [slice(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size)]


def _scan_chunk(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the output of one chunk and the state after it, from the state before it.

    In einsum, b is the batch, i and j are positions, g groups, r heads of a group, p channels, n the state's width.
    """
    groups = b.shape[2]
    stepped = (x.float() * dt.float()[..., None]).unflatten(2, (groups, -1))
    # The logarithm of the decay from the start of the chunk to each position.
    decay = (dt.float() * a.float()).unflatten(2, (groups, -1)).cumsum(1)
    b, c, entering = b.float(), c.float(), state.unflatten(1, (groups, -1))

    by_head = decay.permute(0, 2, 3, 1)
    places = torch.arange(x.shape[1], device=x.device)
    # Masked before exp, which would overflow above the diagonal and make gradients NaN.
    between = (by_head[..., :, None] - by_head[..., None, :]).masked_fill(places[:, None] < places, -math.inf)
    weights = torch.einsum("bign,bjgn->bgij", c, b)[:, :, None] * between.exp()
    # From inputs of this chunk, then from the state before it.
    y = torch.einsum("bgrij,bjgrp->bigrp", weights, stepped)
    y = y + torch.einsum("bign,bgrpn->bigrp", c, entering) * decay.exp()[..., None]

    until_end = (decay[:, -1:] - decay).exp()
    added = torch.einsum("bjgn,bjgrp->bgrpn", b, stepped * until_end[..., None])
    leaving = decay[:, -1].exp()[..., None, None] * entering + added
    return y.flatten(2, 3).to(x.dtype), leaving.flatten(1, 2)


def causal_conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Convolve each channel with its own filter over the current and previous positions.

    Args:
        x: [batch, sequence, channels].
        weight: [channels, 1, width]; the last entry is for the current position.
        bias: [channels].

    Returns:
        Shaped like ``x``.
    """
    padded = pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
    return conv1d(padded, weight, bias, groups=weight.shape[0]).transpose(1, 2)


class GatedRMSNorm(torch.nn.Module):
    """RMSNorm over groups of channels of a gated input: ``norm(x silu(gate)) weight``.

    Args:
        hidden_size: Number of channels.
        eps: Added to the mean square.
        group_size: Number of channels that are normalised together; None for all.
        norm_before_gate: Not supported.
        device: Device of the weight.
        dtype: Data type of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert not norm_before_gate  # Megatron's mixer never asks for it
        self.eps = eps
        self.group_size = group_size or hidden_size
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        torch.nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """Gate and normalise; computed in fp32.

        Args:
            x: [..., channels].
            gate: Shaped like ``x``; None if ``x`` is already gated.
        """
        gated = x.float() if gate is None else x.float() * silu(gate.float())
        grouped = gated.unflatten(-1, (-1, self.group_size))
        normed: torch.Tensor = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        scaled = normed.flatten(-2) * self.weight.float()
        return scaled.to(x.dtype)
