"""Pipeline stages: how many there are, and which hold the embedding and the output layer."""

from __future__ import annotations

import torch
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.models.errors import ModelConfigError


def count_virtual_stages(transformer: TransformerConfig) -> int:
    """Return the number of virtual stages per rank; always 1 without pipeline parallelism, as in megatron.training."""
    if transformer.pipeline_model_parallel_size == 1:
        return 1
    return transformer.virtual_pipeline_model_parallel_size or 1


def count_pipeline_stages(transformer: TransformerConfig) -> int:
    """Return the number of stages in the whole pipeline, including virtual stages."""
    return transformer.pipeline_model_parallel_size * count_virtual_stages(transformer)


def first_and_last(
    transformer: TransformerConfig,
    pp_group: torch.distributed.ProcessGroup,
    *,
    pre_process: bool | None,
    post_process: bool | None,
    vp_stage: int | None,
) -> tuple[bool, bool]:
    """Return whether a stage holds the embedding, and whether it holds the output layer.

    Explicit values of ``pre_process`` and ``post_process`` win; None follows the stage's position in the pipeline.

    Raises:
        ModelConfigError: ``vp_stage`` is not a stage of the virtual pipeline.
    """
    stages = count_virtual_stages(transformer)
    if stages == 1 and vp_stage not in (None, 0):
        raise ModelConfigError(f"vp_stage is {vp_stage}, but there is no virtual pipeline: pass None")
    if stages > 1 and (vp_stage is None or not 0 <= vp_stage < stages):
        raise ModelConfigError(
            f"vp_stage is {vp_stage}, but virtual_pipeline_model_parallel_size is {stages}: "
            f"pass a number from 0 to {stages - 1}"
        )
    if pre_process is None:
        pre_process = not vp_stage and is_pp_first_stage(pp_group)
    if post_process is None:
        # The last virtual stage of the last rank. The first one of the first rank, above, has index 0 or None.
        post_process = (vp_stage or 0) == stages - 1 and is_pp_last_stage(pp_group)
    return pre_process, post_process
