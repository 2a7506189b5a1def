"""Small models of transformers with random values in every parameter."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def build_transformers_model(config: dict[str, Any]) -> Any:
    """Return the model of transformers with random values in every parameter."""
    generator = torch.Generator().manual_seed(5)
    read = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    kind = AutoModelForSeq2SeqLM if read.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(read, attn_implementation="eager").eval()
    biases_of_routers = [(name, buffer) for name, buffer in model.named_buffers() if "correction" in name]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *biases_of_routers]:
            drawn = torch.randn(tensor.shape, generator=generator)
            if "norm" in name or ".ln_" in name:
                tensor.add_(0.3 * drawn)
            elif tensor.dim() == 1 or name.endswith("_bias"):
                tensor.copy_(0.3 * drawn)
            else:
                tensor.copy_(drawn / math.sqrt(tensor.shape[-1]))
    return model
