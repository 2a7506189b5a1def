"""Apply mixed precision to built stages."""

from __future__ import annotations

import logging

import torch
from megatron.core.transformer import MegatronModule, TransformerConfig

from bridge.builders import MixedPrecisionWrapper
from bridge.dist.errors import BuilderContractError

logger = logging.getLogger(__name__)

_KEEP_BIAS_FP32 = "_maintain_float32_expert_bias"


def wrap_mixed_precision(
    stages: list[MegatronModule],
    config: TransformerConfig,
    wrapper: MixedPrecisionWrapper | None,
    *,
    one_precision: bool = False,
) -> list[MegatronModule]:
    """Wrap each stage for fp16 or bf16 if the configuration requests it and there is a wrapper.

    After the wrapper has cast everything, some tensors are restored to fp32 with their exact values: the router biases
    that Megatron keeps in fp32, and parameters whose attribute ``keep_fp32`` is true. The wrapper may return a module
    around the stage, or cast in place and return the stage.

    Args:
        stages: The stages of this rank.
        config: Selects fp16, bf16 or neither.
        wrapper: Called with the configuration and each stage; None for no mixed precision.
        one_precision: Whether all parameters keep the precision that the wrapper gave them, as torch FSDP2 requires. A
            warning is logged if this affects any parameter.

    Raises:
        BuilderContractError: The wrapper did not return a MegatronModule.
    """
    if wrapper is None or not (config.fp16 or config.bf16):
        return stages
    routers = [module for stage in stages for module in stage.modules() if hasattr(module, _KEEP_BIAS_FP32)]
    exact = [
        (router, name, buffer.clone())
        for router in routers
        for name, buffer in router.named_buffers(recurse=False)
        if buffer.dtype is torch.float32
    ]
    kept = [
        (parameter, parameter.detach().clone())
        for stage in stages
        for parameter in stage.parameters()
        if getattr(parameter, "keep_fp32", False)
    ]
    wrapped = [_wrap_stage(stage, config, wrapper) for stage in stages]
    for router in routers:
        getattr(router, _KEEP_BIAS_FP32)()
    for router, name, value in exact:
        buffer = router.get_buffer(name)
        if buffer.dtype is torch.float32:  # in fp32 again, but with values rounded by the cast
            buffer.copy_(value)
    if kept and one_precision:
        logger.warning("torch FSDP2 needs one precision for all parameters: %d with keep_fp32 were cast", len(kept))
        kept = []
    for parameter, value in kept:
        parameter.data = value
    return wrapped


def _wrap_stage(stage: MegatronModule, config: TransformerConfig, wrapper: MixedPrecisionWrapper) -> MegatronModule:
    wrapped: object = wrapper(config, stage)
    if not isinstance(wrapped, MegatronModule):
        raise BuilderContractError(
            f"mixed_precision_wrapper {getattr(wrapper, '__qualname__', wrapper)} must return the stage or a "
            f"MegatronModule around it, got {type(wrapped).__name__}"
        )
    return wrapped
