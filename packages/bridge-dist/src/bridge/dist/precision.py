"""Mixed precision and device placement of freshly built stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer import MegatronModule, TransformerConfig

from bridge.builders import MixedPrecisionWrapper


def move_to_device(stages: Sequence[MegatronModule]) -> None:
    """Move the stages to this rank's CUDA device (on the CPU runtime: where they are already)."""
    for stage in stages:
        stage.cuda(torch.cuda.current_device())


def wrap_mixed_precision(
    stages: list[MegatronModule], config: TransformerConfig, wrapper: MixedPrecisionWrapper | None
) -> list[MegatronModule]:
    """Wrap each stage for fp16 or bf16, if the configuration says so and there is a wrapper.

    Router biases that Megatron keeps in fp32 are put back there after the wrapper has cast everything.
    """
    if wrapper is None or not (config.fp16 or config.bf16):
        return stages
    wrapped = [wrapper(config, stage) for stage in stages]
    for stage in wrapped:
        for module in stage.modules():
            maintain = getattr(module, "_maintain_float32_expert_bias", None)
            if maintain is not None:
                maintain()
    return wrapped
