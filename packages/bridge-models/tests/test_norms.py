"""Norms in PyTorch match their formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.models.backend.norms import torch_norm
from bridge.models.errors import UnsupportedError

Transformer = Callable[..., TransformerConfig]


def test_an_unknown_norm_is_refused(transformer: Transformer) -> None:
    config = transformer()
    config.normalization = "L2Norm"
    with pytest.raises(UnsupportedError, match=r"'L2Norm' is not supported: set one of LayerNorm, RMSNorm"):
        torch_norm(config, 8)


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_norms_match_the_formula(transformer: Transformer, normalization: str, zero_centered: bool) -> None:
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
