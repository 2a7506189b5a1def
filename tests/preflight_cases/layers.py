"""Cases of the rules about layers."""

from __future__ import annotations

import torch

from preflight_cases.setting import EXPERTS, Case, Setting

CASES: dict[str, Case] = {
    "experts-without-sequence-parallelism": Case(
        refused=Setting(sizes={"tp": 2}, transformer=EXPERTS),
        advised=Setting(sizes={"tp": 2}, transformer=EXPERTS | {"sequence_parallel": True}),
        error="ValueError: During training, performance may degrade",
    ),
    "meta-device-and-cpu-initialization": Case(
        refused=Setting(transformer={"init_model_with_meta_device": True, "use_cpu_initialization": True}),
        advised=Setting(transformer={"use_cpu_initialization": True}),
    ),
    "fused-activation": Case(
        refused=Setting(transformer={"activation_func": torch.nn.functional.silu, "bias_activation_fusion": True}),
        advised=Setting(transformer={"activation_func": torch.nn.functional.silu}),
        error="ValueError: Only support fusion of gelu and swiglu",
    ),
    "fused-dropout-of-experts-with-biases": Case(
        refused=Setting(
            transformer=EXPERTS | {"add_bias_linear": True, "moe_grouped_gemm": True, "bias_dropout_fusion": True}
        ),
        advised=Setting(transformer=EXPERTS | {"add_bias_linear": True, "moe_grouped_gemm": True}),
        error="AssertionError: bias_dropout_fusion is not supported",
    ),
}

NO_REPRODUCTION: dict[str, Case] = {
    "recomputed-mlp-with-biases": Case(
        refused=Setting(transformer={"recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
        advised=Setting(
            transformer={"recompute_granularity": "selective", "recompute_modules": ["mlp"], "add_bias_linear": False}
        ),
    ),
}
