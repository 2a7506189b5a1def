#!/usr/bin/env python3
"""Write the presets of published models: the output of from-hf for their config.json, with changes for training.

Reads packages/bridge-models/tests/huggingface. A test fails if a preset differs from what this script writes.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bridge.models.huggingface import from_hf
from bridge.models.huggingface.document_fields import read_fields
from bridge.models.huggingface.fusions import find_fusions

PACKAGE = Path(__file__).parents[2] / "packages/bridge-models"
PUBLISHED = PACKAGE / "tests/huggingface"
PRESETS = PACKAGE / "src/bridge/models/presets"


@dataclass(frozen=True)
class Preset:
    """One published model."""

    model_id: str
    description: str
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields to change for training, by dotted path; None removes one."""

    comments: dict[str, str] = field(default_factory=dict)
    """Comments after fields, by field name."""

    @property
    def published(self) -> Path:
        """The path of the published config.json."""
        return PUBLISHED / f"{self.model_id.replace('/', '--')}.json"


def pre_training(length: int, published: int, **changes: Any) -> dict[str, Any]:
    """Return a sequence length shorter than the published maximum, and other changes to fields of the transformer."""
    comment = f"pre-training length; the published model supports {published}"
    inner = {f"transformer.{name}": value for name, value in changes.items()}
    return {"changes": {"seq_length": length} | inner, "comments": {"seq_length": comment}}


TO_PAD = {"should_pad_vocab": True}
BF16 = {"bf16": True, "params_dtype": "torch.bfloat16"}
LLAMA = "grouped-query attention, SwiGLU, RMSNorm, scaled rotary positions, bf16"
MODELS = {
    "deepseek-v2-lite": Preset(
        "deepseek-ai/DeepSeek-V2-Lite",
        "DeepSeek-V2-Lite: 16B parameters, multi-latent attention, 64 experts, 6 per token, 2 shared, bf16",
        changes={"seq_length": 4096, "transformer.transformer_impl": "local"},
        comments={
            "seq_length": "pre-training length; the published model supports 163840",
            "transformer_impl": "megatron-core 0.19.2 would normalise the queries in Transformer Engine's layers",
        },
    ),
    "deepseek-v3": Preset(
        "deepseek-ai/DeepSeek-V3",
        "DeepSeek-V3: 671B parameters, multi-latent attention, 256 experts, 8 per token, 1 shared, bf16",
        # As in section 4.2 of the paper; without the multi-token prediction layer of 11.6B parameters.
        **pre_training(
            4096,
            163840,
            mtp_num_layers=None,
            moe_router_load_balancing_type="seq_aux_loss",
            moe_aux_loss_coeff=0.0001,
            moe_router_bias_update_rate=0.001,
            init_method_std=0.006,
        ),
    ),
    "gemma-2b": Preset(
        "google/gemma-2b",
        "Gemma 2B: one group of keys and values, gated GELU, zero-centred RMSNorm, tied embeddings, bf16",
    ),
    "gemma-7b": Preset(
        "google/gemma-7b", "Gemma 7B: heads of 256 channels, gated GELU, zero-centred RMSNorm, tied embeddings, bf16"
    ),
    "gpt2-124m": Preset(
        "openai-community/gpt2", "GPT-2 small: 124M parameters, learned positions, tied embeddings", changes=TO_PAD
    ),
    "gpt2-xl": Preset(
        "openai-community/gpt2-xl", "GPT-2 XL: 1.6B parameters, learned positions, tied embeddings", changes=TO_PAD
    ),
    "gpt-oss-20b": Preset(
        "openai/gpt-oss-20b",
        "gpt-oss 20B: 32 experts, 4 per token, windows in every other layer, attention sinks, YaRN, bf16",
        **pre_training(4096, 131072, **BF16),  # published with 4-bit experts
    ),
    "gpt-oss-120b": Preset(
        "openai/gpt-oss-120b",
        "gpt-oss 120B: 128 experts, 4 per token, windows in every other layer, attention sinks, YaRN, bf16",
        **pre_training(4096, 131072, **BF16),  # published with 4-bit experts
    ),
    "llama-2-7b": Preset(
        "meta-llama/Llama-2-7b-hf",
        "Llama 2 7B: SwiGLU, RMSNorm, rotary positions, bf16",
        changes={"transformer.fp16": None} | {f"transformer.{name}": value for name, value in BF16.items()},
    ),
    "llama-3-8b": Preset(
        "meta-llama/Meta-Llama-3-8B", "Llama 3 8B: grouped-query attention, SwiGLU, RMSNorm, rotary positions, bf16"
    ),
    "llama-3.1-8b": Preset("meta-llama/Llama-3.1-8B", f"Llama 3.1 8B: {LLAMA}", **pre_training(8192, 131072)),
    "llama-3.1-70b": Preset("meta-llama/Llama-3.1-70B", f"Llama 3.1 70B: {LLAMA}", **pre_training(8192, 131072)),
    "llama-3.1-405b": Preset("meta-llama/Llama-3.1-405B", f"Llama 3.1 405B: {LLAMA}", **pre_training(8192, 131072)),
    "llama-3.2-1b": Preset(
        "meta-llama/Llama-3.2-1B", f"Llama 3.2 1B: tied embeddings, {LLAMA}", **pre_training(8192, 131072)
    ),
    "mamba2-2.7b": Preset(
        "state-spaces/mamba2-2.7b",
        "Mamba-2 2.7B: 64 Mamba layers, RMSNorm, tied embeddings",
        changes={"seq_length": 2048, "transformer.init_method_std": 0.02},
        comments={"seq_length": "pre-training length; the published model has no maximum"},
    ),
    "mamba-codestral-7b": Preset(
        "mistralai/Mamba-Codestral-7B-v0.1",
        "Mamba-Codestral 7B: 64 Mamba-2 layers of 8 groups, RMSNorm, bf16",
        changes={"transformer.init_method_std": 0.02},
    ),
    "mistral-7b": Preset(
        "mistralai/Mistral-7B-v0.3",
        "Mistral 7B v0.3: grouped-query attention, SwiGLU, RMSNorm, rotary positions, bf16",
    ),
    "mixtral-8x7b": Preset("mistralai/Mixtral-8x7B-v0.1", "Mixtral 8x7B: 47B parameters, 8 experts, 2 per token, bf16"),
    "mixtral-8x22b": Preset(
        "mistralai/Mixtral-8x22B-v0.1", "Mixtral 8x22B: 141B parameters, 8 experts, 2 per token, bf16"
    ),
    "nemotron-3-nano-30b-a3b": Preset(
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "Nemotron 3 Nano: 23 Mamba layers, 23 of 128 experts (6 per token, 1 shared), 6 of attention, bf16",
        **pre_training(8192, 262144),
    ),
    "nemotron-h-8b": Preset(
        "nvidia/Nemotron-H-8B-Base-8K",
        "Nemotron-H 8B: a hybrid of 24 Mamba, 24 MLP and 4 attention layers, squared ReLU, RMSNorm, no positions, bf16",
    ),
    "phi-3-mini": Preset(
        "microsoft/Phi-3-mini-4k-instruct", "Phi-3 mini: 3.8B parameters, SwiGLU, RMSNorm, windows of 2047 tokens, bf16"
    ),
    "phi-3-medium": Preset(
        "microsoft/Phi-3-medium-4k-instruct",
        "Phi-3 medium: 14B parameters, grouped-query attention, SwiGLU, RMSNorm, windows of 2047 tokens, bf16",
    ),
    "qwen1.5-moe-a2.7b": Preset(
        "Qwen/Qwen1.5-MoE-A2.7B",
        "Qwen1.5-MoE: 14B parameters, 60 experts, 4 per token, 1 gated shared expert, bf16",
    ),
    "qwen2.5-0.5b": Preset(
        "Qwen/Qwen2.5-0.5B", "Qwen2.5 0.5B: biases in query, key and value projections, tied embeddings, bf16"
    ),
    "qwen2.5-7b": Preset(
        "Qwen/Qwen2.5-7B",
        "Qwen2.5 7B: grouped-query attention with biases, SwiGLU, RMSNorm, bf16",
        **pre_training(32768, 131072),
    ),
    "qwen2.5-72b": Preset(
        "Qwen/Qwen2.5-72B",
        "Qwen2.5 72B: grouped-query attention with biases, SwiGLU, RMSNorm, bf16",
        **pre_training(32768, 131072),
    ),
    "qwen3-0.6b": Preset(
        "Qwen/Qwen3-0.6B",
        "Qwen3 0.6B: normalised queries and keys, SwiGLU, RMSNorm, tied embeddings, bf16",
        **pre_training(32768, 40960),
    ),
    "qwen3-8b": Preset(
        "Qwen/Qwen3-8B", "Qwen3 8B: normalised queries and keys, SwiGLU, RMSNorm, bf16", **pre_training(32768, 40960)
    ),
    "qwen3-30b-a3b": Preset(
        "Qwen/Qwen3-30B-A3B",
        "Qwen3 30B-A3B: 128 experts, 8 per token, normalised queries and keys, bf16",
        **pre_training(32768, 40960),
    ),
    "qwen3-235b-a22b": Preset(
        "Qwen/Qwen3-235B-A22B",
        "Qwen3 235B-A22B: 128 experts, 8 per token, normalised queries and keys, bf16",
        **pre_training(32768, 40960),
    ),
    "t5-base": Preset(
        "google-t5/t5-base", "T5 base: 223M parameters, encoder and decoder, relative positions, tied embeddings"
    ),
    "t5-11b": Preset(
        "google-t5/t5-11b",
        "T5 11B: 128 heads of 128 channels and wide feed-forward layers over a hidden size of 1024, tied embeddings",
    ),
    "t5-v1.1-xl": Preset(
        "google/t5-v1_1-xl", "T5 1.1 XL: 2.8B parameters, encoder and decoder, gated GELU, untied output layer"
    ),
}


class Dumper(yaml.SafeDumper):
    """Writes lists on one line, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values out each time."""
        return True


Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def make_text(preset: Preset) -> str:
    """Return the text of a preset file."""
    data = from_hf(json.loads(preset.published.read_text()), model_id=preset.model_id).data
    for path, value in preset.changes.items():
        set_field(data, path, value)
    data["transformer"] |= find_fusions(read_fields(data))  # once more: they depend on fields that were changed
    data["transformer"] = data.pop("transformer")  # keep the longest field last
    lines = yaml.dump(data, Dumper=Dumper, sort_keys=False, width=1000, allow_unicode=True).splitlines()
    for name, comment in preset.comments.items():
        lines = [f"{line}  # {comment}" if re.match(rf"\s*{name}:", line) else line for line in lines]
    return "\n".join([f"# {preset.description}", *lines]) + "\n"


def set_field(data: dict[str, Any], path: str, value: Any) -> None:
    """Set a field, or remove it."""
    *outer, name = path.split(".")
    for part in outer:
        data = data[part]
    if value is None:
        data.pop(name, None)
    else:
        data[name] = value


if __name__ == "__main__":
    for name, preset in MODELS.items():
        (PRESETS / f"{name}.yaml").write_text(make_text(preset))
