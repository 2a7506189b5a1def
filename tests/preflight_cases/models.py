"""Cases of the rules of model families."""

from __future__ import annotations

import torch

from bridge.models.mamba import MambaModelConfig
from bridge.models.t5 import T5ModelConfig
from preflight_cases.setting import (
    EXPERTS,
    INTERLEAVED,
    OVERLAPPED_P2P,
    PIPELINE,
    TENSOR_PARALLEL,
    TORCH_FSDP2,
    VOCAB,
    Case,
    Setting,
)

UNTIED = {"share_embeddings_and_output_weights": False}
RELATIVE = {"position_embedding_type": "relative"}
MODELOPT = {"restore_modelopt_state": True}

CASES: dict[str, Case] = {
    "mamba-heads-divide": Case(
        refused=Setting(family=MambaModelConfig, sizes={"tp": 2}, transformer={"mamba_num_groups": 1}),
        advised=Setting(family=MambaModelConfig, sizes={"tp": 2}),
        error="AssertionError: ngroups must be evenly divisible by tp_size",
    ),
    "mamba-params-dtype": Case(
        refused=Setting(family=MambaModelConfig, transformer={"bf16": True}),
        advised=Setting(family=MambaModelConfig, transformer={"bf16": True, "params_dtype": torch.bfloat16}),
        error="mixed dtype",
    ),
    "t5-pipeline": Case(
        refused=Setting(family=T5ModelConfig, sizes=PIPELINE),
        advised=Setting(family=T5ModelConfig),
        error="UnsupportedError: T5 cannot be split",
    ),
    "t5-context-parallelism": Case(
        refused=Setting(family=T5ModelConfig, sizes={"cp": 2}),
        advised=Setting(family=T5ModelConfig),
        error="UnsupportedError: attention under context parallelism",
    ),
    "t5-encoder-divides": Case(
        refused=Setting(family=T5ModelConfig, sizes={"tp": 2}, model={"encoder_ffn_hidden_size": 33}),
        advised=Setting(family=T5ModelConfig, sizes={"tp": 2}, model={"encoder_ffn_hidden_size": 34}),
        error="33 is not divisible by 2",
    ),
    "t5-torch-fsdp2-learned-positions": Case(
        refused=Setting(family=T5ModelConfig, model=UNTIED, flags=TORCH_FSDP2),
        advised=Setting(family=T5ModelConfig, model=UNTIED | RELATIVE, flags=TORCH_FSDP2),
        error="TypeError: Invariant encountered",
    ),
    "t5-recomputed-relative-positions": Case(
        refused=Setting(
            family=T5ModelConfig,
            model=RELATIVE,
            transformer={"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        ),
        advised=Setting(family=T5ModelConfig, model=RELATIVE),
        error="RuntimeError: Trying to backward through the graph a second time",
    ),
}

NO_REPRODUCTION: dict[str, Case] = {
    "modelopt-virtual-pipeline": Case(
        refused=Setting(sizes=INTERLEAVED, transformer=OVERLAPPED_P2P, model=MODELOPT),
        advised=Setting(sizes=PIPELINE, transformer={"num_layers": 4}, model=MODELOPT),
    ),
    "modelopt-meta-device": Case(
        refused=Setting(transformer={"init_model_with_meta_device": True}, model=MODELOPT),
        advised=Setting(model=MODELOPT),
    ),
    "modelopt-experts": Case(
        refused=Setting(sizes={"tp": 2, "ep": 2}, transformer=EXPERTS | {"sequence_parallel": True}, model=MODELOPT),
        advised=Setting(sizes={"ep": 2}, transformer=EXPERTS, model=MODELOPT),
        world_size=4,
    ),
    "vocabulary-divides": Case(
        refused=Setting(sizes=TENSOR_PARALLEL, model={"vocab_size": VOCAB + 1}),
        advised=Setting(sizes=TENSOR_PARALLEL, model={"vocab_size": VOCAB + 1, "should_pad_vocab": True}),
    ),
    "predictions-in-a-pipeline": Case(
        refused=Setting(sizes=PIPELINE, transformer={"mtp_num_layers": 1}),
        advised=Setting(sizes=PIPELINE, transformer={"mtp_num_layers": 1}, model={"position_embedding_type": "rope"}),
    ),
    "hybrid-stages": Case(
        refused=Setting(
            family=MambaModelConfig,
            sizes=PIPELINE,
            transformer={"num_layers": 4},
            model={"hybrid_layer_pattern": "M|M|MM"},
        ),
        advised=Setting(
            family=MambaModelConfig,
            sizes=PIPELINE,
            transformer={"num_layers": 4},
            model={"hybrid_layer_pattern": "MM|MM"},
        ),
    ),
    "mamba-offloading": Case(
        refused=Setting(family=MambaModelConfig, transformer={"cpu_offloading": True, "cpu_offloading_num_layers": 1}),
        advised=Setting(family=MambaModelConfig),
    ),
}
