"""The place of a stage in the pipeline."""

from __future__ import annotations

import torch
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.models.errors import ModelConfigError


def virtual_stages(transformer: TransformerConfig) -> int:
    """Return the virtual stages per rank; a pipeline of one rank is not divided, whatever the configuration says."""
    if transformer.pipeline_model_parallel_size == 1:
        return 1
    return transformer.virtual_pipeline_model_parallel_size or 1


def pipeline_stages(transformer: TransformerConfig) -> int:
    """Return the stages of the whole pipeline, virtual ones counted."""
    return transformer.pipeline_model_parallel_size * virtual_stages(transformer)


def ends(
    transformer: TransformerConfig,
    pp_group: torch.distributed.ProcessGroup,
    *,
    pre_process: bool | None,
    post_process: bool | None,
    vp_stage: int | None,
) -> tuple[bool, bool]:
    """Return whether a stage holds the embedding, and whether the output layer; what is given stays as it is.

    Raises:
        ModelConfigError: ``vp_stage`` does not fit the virtual pipeline.
    """
    stages = virtual_stages(transformer)
    if stages == 1 and vp_stage not in (None, 0):
        raise ModelConfigError(f"vp_stage is {vp_stage}, but there is no virtual pipeline: pass None")
    if stages > 1 and (vp_stage is None or not 0 <= vp_stage < stages):
        raise ModelConfigError(
            f"vp_stage is {vp_stage}, but virtual_pipeline_model_parallel_size is {stages}: pass 0 to {stages - 1}"
        )
    if pre_process is None:
        pre_process = not vp_stage and is_pp_first_stage(pp_group)
    if post_process is None:
        post_process = (vp_stage or 0) == stages - 1 and is_pp_last_stage(pp_group)
    return pre_process, post_process
