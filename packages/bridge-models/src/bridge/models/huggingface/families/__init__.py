"""One file per architecture, named by its ``model_type``, with its table; their order does not matter.

It imports ``architecture``, ``fields``, ``targets``, ``translation`` and ``weights`` of the parent package. No family
imports another.
"""

from __future__ import annotations

from collections.abc import Mapping

from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.families.deepseek_v2 import DEEPSEEK_V2
from bridge.models.huggingface.families.deepseek_v3 import DEEPSEEK_V3
from bridge.models.huggingface.families.gemma import GEMMA
from bridge.models.huggingface.families.gpt2 import GPT2
from bridge.models.huggingface.families.gpt_oss import GPT_OSS
from bridge.models.huggingface.families.llama import LLAMA
from bridge.models.huggingface.families.mamba2 import MAMBA2
from bridge.models.huggingface.families.mistral import MISTRAL
from bridge.models.huggingface.families.mixtral import MIXTRAL
from bridge.models.huggingface.families.nemotron_h import NEMOTRON_H
from bridge.models.huggingface.families.phi3 import PHI3
from bridge.models.huggingface.families.qwen2 import QWEN2
from bridge.models.huggingface.families.qwen2_moe import QWEN2_MOE
from bridge.models.huggingface.families.qwen3 import QWEN3
from bridge.models.huggingface.families.qwen3_moe import QWEN3_MOE
from bridge.models.huggingface.families.t5 import T5

ARCHITECTURES: Mapping[str, Architecture] = {
    one.model_type: one
    for one in (
        GPT2,
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        PHI3,
        GEMMA,
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
        GPT_OSS,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        MAMBA2,
        NEMOTRON_H,
        T5,
    )
}
"""Architectures by ``model_type``."""
