"""Mixed precision and device placement of freshly built stages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypeVar

import torch
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

    Parameters keep their attributes, and a parameter that two modules share stays shared.

    Args:
        module: Changed in place and returned.
        device: Where its parameters and buffers shall be.
        recurse: False leaves the children as they are.
    """

    placed: dict[torch.Tensor, torch.nn.Parameter] = {}
    for owner in module.modules() if recurse else [module]:
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if parameter not in placed:
                placed[parameter] = torch.nn.Parameter(_place(parameter.data, device), parameter.requires_grad)
                # Megatron keeps what it knows of a parameter, such as how it is split, in attributes.
                vars(placed[parameter]).update(vars(parameter))
            owner._parameters[name] = placed[parameter]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = _place(buffer, device)
    return module


def _place(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)


def materialize_stages(stages: Sequence[MegatronModule]) -> None:
    """Materialise stages that were built on the meta device, and say that they hold no weights yet."""
    for stage in stages:
        materialize(stage, torch.device("cuda"))
    logger.warning("init_model_with_meta_device: the weights are uninitialised memory; load a checkpoint before use")

