"""Wrap a stage with Megatron's DistributedDataParallel, and lay out its buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    param_and_grad_buffer,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.param_layout import FullParamLayout
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.core.utils import get_model_config

from bridge.dist.engine.options import BuildOptions

# In parameters, the defaults of megatron-core's DistributedDataParallelConfig: buckets must be large enough that a ring
# all-reduce over all ranks is bound by bandwidth, not by latency.
_SMALLEST_BUCKET = 40_000_000
_BUCKET_PER_RANK = 1_000_000


def wrap_ddp(
    stage: MegatronModule, pg_collection: ProcessGroupCollection, options: BuildOptions, *, one_bucket: bool
) -> DistributedDataParallel:
    """Wrap a stage with DDP. With a distributed optimizer, lay out its buffers for sharding."""
    assert options.ddp_config is not None
    # Wrapping with reduce_scatter_with_fp32_accumulation makes megatron-core 0.19.2 replace this function for all
    # models of the process, and gradients of later models are lost. Restore it, so that the latest build decides.
    param_and_grad_buffer.dist_reduce_scatter_func = torch.distributed.reduce_scatter_tensor
    layout = None
    if options.ddp_config.use_distributed_optimizer:
        layout = _compute_layout(stage, pg_collection, options, one_bucket=one_bucket)
    return DistributedDataParallel(
        config=get_model_config(stage),
        ddp_config=options.ddp_config,
        module=stage,
        disable_bucketing=one_bucket,
        pg_collection=pg_collection,
        full_param_layout=layout,
    )


def compute_bucket_size(
    ddp_config: DistributedDataParallelConfig, stages: Sequence[torch.nn.Module], *, data_parallel_size: int
) -> int | None:
    """Return the number of parameters per gradient bucket; None for a single bucket.

    Several buckets help only if the gradient reduction overlaps with the backward pass.

    Args:
        ddp_config: Its ``num_buckets`` counts buckets over all stages of this rank.
        stages: The stages of this rank.
        data_parallel_size: Number of data-parallel ranks, including context-parallel ranks.
    """
    if not ddp_config.overlap_grad_reduce:
        return None
    if ddp_config.num_buckets is not None:
        parameters = sum(parameter.numel() for stage in stages for parameter in stage.parameters())
        return int(parameters // ddp_config.num_buckets)
    if ddp_config.bucket_size is not None:
        return int(ddp_config.bucket_size)
    return max(_SMALLEST_BUCKET, _BUCKET_PER_RANK * data_parallel_size)


def _compute_layout(
    stage: MegatronModule, pg_collection: ProcessGroupCollection, options: BuildOptions, *, one_bucket: bool
) -> FullParamLayout:
    """Lay out the trainable parameters over the ranks of one optimizer instance."""
    assert options.ddp_config is not None
    shards = getattr(pg_collection, "intra_dp_cp", None) or pg_collection.dp_cp
    expert_shards = getattr(pg_collection, "intra_expt_dp", None) or pg_collection.expt_dp
    no_buckets = one_bucket or pg_collection.pp.rank() > 0  # as DDP decides in megatron-core 0.19.2
    optimizer = LayerWiseDistributedOptimizer if options.has_layer_wise_layout else DistributedOptimizer
    layout: FullParamLayout = optimizer.compute_full_param_layout(
        [parameter for parameter in stage.parameters() if parameter.requires_grad],
        None if no_buckets else options.ddp_config.bucket_size,
        shards.size(),
        options.ddp_config,
        expert_data_parallel_world_size=expert_shards.size(),
    )
    return layout
