"""Wrapping stages for data parallelism: DDP, Megatron-FSDP, torch FSDP2."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    FullyShardedDataParallel,
    TorchFullyShardedDataParallel,
)
from megatron.core.full_cuda_graph import get_shared_capture_stream
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_model_config, unwrap_model

from bridge.dist.errors import PreflightError
from bridge.dist.options import BuildOptions, Wrapper

# A bucket should be large enough that a ring all-reduce over all ranks is bound by bandwidth, not by latency.
_SMALLEST_BUCKET = 40_000_000
_BUCKET_PER_RANK = 1_000_000


def wrap_data_parallel(
    stages: list[MegatronModule], pg_collection: ProcessGroupCollection, options: BuildOptions
) -> list[MegatronModule]:
    """Wrap each stage as the options say, and make data-parallel ranks start from the same weights if asked for.

    ``options.ddp_config`` is not changed: the wrappers get a copy, with the bucket size filled in.
    """
    assert options.ddp_config is not None
    ddp_config = copy.copy(options.ddp_config)
    if options.wrapper is not Wrapper.TORCH_FSDP2:
        ddp_config.bucket_size = bucket_size(ddp_config, stages, data_parallel_size=pg_collection.dp_cp.size())
    if options.data_parallel_random_init and options.wrapper is not Wrapper.DDP:
        # Before wrapping: parameters that are sharded afterwards (DTensor) cannot be broadcast.
        _broadcast_weights(stages, pg_collection)
    with _on_side_stream(stages[0]):
        wrapped = [
            _wrap_stage(stage, pg_collection, options.wrapper, ddp_config, one_bucket=one_bucket)
            for stage, one_bucket in zip(stages, _one_bucket_flags(len(stages), options), strict=True)
        ]
    if options.data_parallel_random_init and options.wrapper is Wrapper.DDP:
        for stage in wrapped:
            assert isinstance(stage, DistributedDataParallel)
            stage.broadcast_params()
    return wrapped


def bucket_size(
    ddp_config: DistributedDataParallelConfig, stages: Sequence[torch.nn.Module], *, data_parallel_size: int
) -> int | None:
    """Return how many parameters a gradient bucket holds; None puts all into one bucket.

    Without overlap of the gradient reduction there is nothing to gain from several buckets. ``num_buckets`` counts
    buckets over all stages of this rank. ``data_parallel_size`` includes context-parallel ranks.
    """
    if not ddp_config.overlap_grad_reduce:
        return None
    if ddp_config.num_buckets is not None:
        parameters = sum(parameter.numel() for stage in stages for parameter in stage.parameters())
        return int(parameters // ddp_config.num_buckets)
    if ddp_config.bucket_size is not None:
        return int(ddp_config.bucket_size)
    return max(_SMALLEST_BUCKET, _BUCKET_PER_RANK * data_parallel_size)


def _broadcast_weights(stages: Sequence[torch.nn.Module], pg_collection: ProcessGroupCollection) -> None:
    """Give every data-parallel rank the weights of the first; experts within their own data-parallel group."""
    for stage in stages:
        for parameter in stage.parameters():
            if parameter.is_meta:
                continue
            group = pg_collection.dp_cp if getattr(parameter, "allreduce", True) else pg_collection.expt_dp
            weight = parameter.data.cuda()
            torch.distributed.broadcast(weight, group_src=0, group=group)
            parameter.data.copy_(weight)


def _one_bucket_flags(stages: int, options: BuildOptions) -> list[bool]:
    """Whether each chunk goes without buckets: only the first chunk's communication is on the critical path."""
    return [index > 0 or options.overlap_param_gather_with_optimizer_step for index in range(stages)]


def _wrap_stage(
    stage: MegatronModule,
    pg_collection: ProcessGroupCollection,
    wrapper: Wrapper,
    ddp_config: DistributedDataParallelConfig,
    *,
    one_bucket: bool,
) -> MegatronModule:
    common: dict[str, Any] = {
        "config": get_model_config(stage),
        "ddp_config": ddp_config,
        "module": stage,
        "disable_bucketing": one_bucket,
    }
    if wrapper is Wrapper.TORCH_FSDP2:
        return _wrap_torch_fsdp2(stage, common)
    if wrapper is Wrapper.MEGATRON_FSDP:
        return FullyShardedDataParallel(**common, pg_collection=pg_collection)
    if ddp_config.use_distributed_optimizer:
        common["full_param_layout"] = _distributed_optimizer_layout(
            stage, pg_collection, ddp_config, one_bucket=one_bucket
        )
    return DistributedDataParallel(**common, pg_collection=pg_collection)


def _wrap_torch_fsdp2(stage: MegatronModule, common: dict[str, Any]) -> MegatronModule:
    """Wrap with FSDP2, telling it which layers there are.

    megatron-core 0.19.2 shards the linear layers inside a layer a second time, and fails, unless transformer_impl is
    local. Without Transformer Engine the layers are local whatever the configuration says.
    """
    config = common["config"]
    if getattr(unwrap_model(stage), "share_embeddings_and_output_weights", False):
        # Seen in megatron-core 0.19.2: the tied weight is sharded in one of its uses only.
        raise PreflightError(["torch FSDP2 fails with tied embeddings: untie them, or wrap with ddp or megatron-fsdp"])
    layers = (module for module in stage.modules() if isinstance(module, TransformerLayer))
    if any(isinstance(module, ColumnParallelLinear) for layer in layers for module in layer.modules()):
        common = common | {"config": copy.copy(config)}
        common["config"].transformer_impl = "local"
    wrapped = TorchFullyShardedDataParallel(**common)
    wrapped.config = config
    return wrapped


def _distributed_optimizer_layout(
    stage: MegatronModule,
    pg_collection: ProcessGroupCollection,
    ddp_config: DistributedDataParallelConfig,
    *,
    one_bucket: bool,
) -> Any:
    """Lay out the trainable parameters for the group that the optimizer shards over.

    That is the group within one optimizer instance where there are several instances.
    """
    shards = getattr(pg_collection, "intra_dp_cp", None) or pg_collection.dp_cp
    expert_shards = getattr(pg_collection, "intra_expt_dp", None) or pg_collection.expt_dp
    no_buckets = one_bucket or pg_collection.pp.rank() > 0
    return DistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in stage.parameters() if parameter.requires_grad],
        None if no_buckets else ddp_config.bucket_size,
        shards.size(),
        ddp_config,
        expert_data_parallel_world_size=expert_shards.size(),
    )


@contextlib.contextmanager
def _on_side_stream(stage: MegatronModule) -> Iterator[None]:
    """Construct wrappers on a stream of their own, which waits for the current one, and the current one for it.

    With a full-iteration CUDA graph it must be the capture stream, since the autograd nodes that the wrappers keep
    remember the stream they were made on.
    """
    full_iteration = get_model_config(stage).cuda_graph_impl == "full_iteration"
    stream = get_shared_capture_stream() if full_iteration else torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
