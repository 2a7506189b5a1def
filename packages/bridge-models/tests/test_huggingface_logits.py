"""Models from `bridge from-hf` compute the logits of transformers, for small models of each family.

All weights are random, including norms and biases, and are copied by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from built_models import build_bridge_model
from huggingface_cases import MODELS
from huggingface_models import build_transformers_model
from huggingface_weights import Weights, convert_weights
from megatron.core.process_groups_config import ProcessGroupCollection

from bridge.dist.cpu import cpu_runtime


@pytest.fixture(scope="module", autouse=True)
def _on_cpu(pg_collection: ProcessGroupCollection) -> Iterator[None]:
    with cpu_runtime():
        yield


def load_weights(bridge_model: Any, weights: Weights) -> None:
    """Load weights of transformers; the bias that only Megatron-Core's T5 has stays zero."""
    missing, unexpected = bridge_model.load_state_dict(weights, strict=False)
    own = [name for name in missing if not name.endswith(("_extra_state", "output_layer.bias"))]
    assert (own, unexpected) == ([], [])


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_logits_match_transformers(case: str, pg_collection: ProcessGroupCollection) -> None:
    config = MODELS[case]
    transformers_model = build_transformers_model(config)
    bridge_model = build_bridge_model(config, pg_collection).eval()
    load_weights(bridge_model, convert_weights(transformers_model.config, transformers_model.state_dict()))
    generator = torch.Generator().manual_seed(3)
    source, tokens = (torch.randint(96, (2, length), generator=generator) for length in (40, 24))
    if transformers_model.config.is_encoder_decoder:
        expected = transformers_model(input_ids=source, decoder_input_ids=tokens).logits
        found = bridge_model(source, tokens, None, None, None)
    else:
        expected = transformers_model(tokens, use_cache=False).logits
        found = bridge_model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
