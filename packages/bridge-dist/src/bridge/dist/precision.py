"""Mixed precision and device placement of freshly built stages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypeVar

import torch
from megatron.core.fp8_utils import correct_amax_history_if_needed
from megatron.core.transformer import MegatronModule, TransformerConfig

from bridge.builders import MixedPrecisionWrapper

logger = logging.getLogger(__name__)

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)


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


def materialize(module: ModuleT, device: torch.device, *, recurse: bool = True) -> ModuleT:
    """Give meta tensors uninitialised memory on ``device`` and move the others there, values kept.

    Args:
        module: Changed in place and returned.
        device: Where its parameters and buffers shall be.
        recurse: False leaves the children as they are.
    """

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    return module._apply(place, recurse=recurse)  # type: ignore[no-untyped-call, no-any-return]


def materialize_stages(stages: Sequence[MegatronModule]) -> None:
    """Materialise stages that were built on the meta device, and say that they hold no weights yet."""
    for stage in stages:
        materialize(stage, torch.device("cuda"))
    logger.warning("init_model_with_meta_device: the weights are uninitialised memory; load a checkpoint before use")


def correct_fp8_history(stages: list[MegatronModule]) -> None:
    """Undo what casting did to the amax histories of FP8 modules (nothing without FP8)."""
    correct_amax_history_if_needed(list(stages))
