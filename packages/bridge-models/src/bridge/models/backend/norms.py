"""Norms in PyTorch, which work under sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.models.backend.extra_state import HasExtraState
from bridge.models.errors import UnsupportedError


def torch_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> TorchNorm:
    """Build the torch norm that a configuration asks for.

    Under sequence parallelism each rank sees part of the sequence, so the weights are marked for Megatron to add up
    their gradients over the tensor-parallel ranks.

    Raises:
        UnsupportedError: The normalization is not supported.
    """
    norms: dict[str, Callable[..., TorchNorm]] = (
        {"LayerNorm": ZeroCenteredLayerNorm, "RMSNorm": ZeroCenteredRMSNorm}
        if config.layernorm_zero_centered_gamma
        else {"LayerNorm": TorchLayerNorm, "RMSNorm": TorchRMSNorm}
    )
    if config.normalization not in norms:
        raise UnsupportedError(
            f"normalization {config.normalization!r} is not supported: set one of {', '.join(norms)}"
        )
    norm = norms[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def fused_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> TorchNorm:
    """Build the norm of ``torch_norm`` for a place where Transformer Engine fuses it with the next linear layer."""
    norm = torch_norm(config, hidden_size, eps)
    norm.is_fused = True
    return norm


class TorchNorm(HasExtraState):
    """Base class of this backend's norms: decides which keys they write into checkpoints."""

    is_fused = False
    """Whether Transformer Engine fuses it with the next linear layer, which then has the only extra state."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_fused:
            del destination[f"{prefix}_extra_state"]


class TorchLayerNorm(TorchNorm, torch.nn.LayerNorm):
    """torch's LayerNorm with a ``forward`` of its own, so that ModelOpt does not recognise it.

    nvidia-modelopt 0.47 recognises ``torch.nn.LayerNorm`` by its ``forward`` and quantises its input, as with no other
    norm. Megatron's distributed checkpoints then lose these quantizers.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension."""
        return super().forward(x)


class TorchRMSNorm(TorchNorm, torch.nn.RMSNorm):
    """torch's RMSNorm."""


class ZeroCenteredLayerNorm(TorchNorm, torch.nn.LayerNorm):
    """LayerNorm that multiplies by 1 + weight; the weight is initialised to zero."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension."""
        normed = torch.nn.functional.layer_norm(x, self.normalized_shape, eps=self.eps)
        return torch.addcmul(normed, normed, self.weight) + self.bias  # 1 + weight would round a small weight away


class ZeroCenteredRMSNorm(TorchNorm, torch.nn.RMSNorm):
    """RMSNorm that multiplies by 1 + weight; the weight is initialised to zero."""

    def reset_parameters(self) -> None:
        """Set the weight to zero."""
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension."""
        normed = torch.nn.functional.rms_norm(x, self.normalized_shape, eps=self.eps)
        return torch.addcmul(normed, normed, self.weight)
