"""Mixed precision of freshly built stages."""

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
    """Wrap each stage for fp16 or bf16, if the configuration says so and there is a wrapper.

    What stays in fp32 is put back there, with the values it had, after the wrapper has cast everything: router biases
    that Megatron keeps so, and parameters with an attribute ``keep_fp32`` that is true. The wrapper may also cast in
    place and return the stage itself; other modules of its choice may stay in another precision.

    With ``one_precision`` parameters stay as the wrapper cast them, as torch FSDP2 needs; a warning says so.

    Raises:
        BuilderContractError: The wrapper returned something else than a MegatronModule.
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
        if buffer.dtype is torch.float32:
            buffer.copy_(value)
    if kept and one_precision:
        logger.warning("torch FSDP2 shards parameters of one precision: %d do not stay in fp32", len(kept))
        kept = []
    for parameter, value in kept:
        parameter.data = value
    return wrapped


def _wrap_stage(stage: MegatronModule, config: TransformerConfig, wrapper: MixedPrecisionWrapper) -> MegatronModule:
    made: object = wrapper(config, stage)
    if not isinstance(made, MegatronModule):
        raise BuilderContractError(
            f"mixed_precision_wrapper {getattr(wrapper, '__qualname__', wrapper)} returned {type(made).__name__}: "
            "return the stage, or a MegatronModule around it"
        )
    return made
