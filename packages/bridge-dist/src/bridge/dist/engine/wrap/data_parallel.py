"""Wrap the stages of this rank for data parallelism, and broadcast weights to its data-parallel ranks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.full_cuda_graph import get_shared_capture_stream
from megatron.core.optimizer.layer_wise_optimizer import tag_params_for_buffer_routing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.core.utils import get_model_config

from bridge.dist.checks.stages import check_stages
from bridge.dist.engine.meta import Share
from bridge.dist.engine.options import BuildOptions
from bridge.dist.engine.wrap.ddp import compute_bucket_size, wrap_ddp
from bridge.dist.engine.wrap.megatron_fsdp import complete_ddp_config, wrap_megatron_fsdp
from bridge.dist.engine.wrap.torch_fsdp2 import wrap_torch_fsdp2
from bridge.dist.wrapper import Wrapper


def wrap_data_parallel(
    stages: list[MegatronModule], pg_collection: ProcessGroupCollection, options: BuildOptions
) -> list[MegatronModule]:
    """Wrap each stage, and broadcast weights to data-parallel ranks if ``options.data_parallel_random_init``.

    ``options.ddp_config`` is not changed: the wrappers get a copy with values that depend on the stages.

    Raises:
        PreflightError: The wrapper cannot train these stages.
    """
    check_stages(stages, options)
    options = replace(options, ddp_config=_resolve_ddp_config(stages, pg_collection, options))
    if options.has_layer_wise_layout:
        tag_params_for_buffer_routing(stages)
    share = partial(_broadcast, pg_collection=pg_collection) if options.data_parallel_random_init else None
    if share is not None and options.wrapper is not Wrapper.DDP:
        # Before wrapping: parameters that are sharded afterwards (DTensor) cannot be broadcast.
        for stage in stages:
            for parameter in stage.parameters():
                if not parameter.is_meta:  # meta parameters are shared when they are initialised
                    share(parameter)
    with _use_side_stream(stages[0]):
        wrapped = [
            _wrap_stage(stage, pg_collection, options, one_bucket=one_bucket, share=share)
            for stage, one_bucket in zip(stages, _list_one_bucket_flags(len(stages), options), strict=True)
        ]
    if options.data_parallel_random_init and options.wrapper is Wrapper.DDP:
        for stage in wrapped:
            assert isinstance(stage, DistributedDataParallel)
            stage.broadcast_params()
    return wrapped


def _resolve_ddp_config(
    stages: Sequence[MegatronModule], pg_collection: ProcessGroupCollection, options: BuildOptions
) -> DistributedDataParallelConfig:
    """Return a copy of the DDP configuration, completed with values that depend on the stages and the wrapper."""
    assert options.ddp_config is not None
    resolved = copy.copy(options.ddp_config)
    if options.wrapper is not Wrapper.TORCH_FSDP2:
        resolved.bucket_size = compute_bucket_size(resolved, stages, data_parallel_size=pg_collection.dp_cp.size())
    if options.has_layer_wise_layout:
        resolved.use_distributed_optimizer = True  # reduces the gradients of a parameter only to the rank that owns it
    if options.wrapper is Wrapper.MEGATRON_FSDP:
        complete_ddp_config(resolved, stages)
    return resolved


def _broadcast(parameter: torch.nn.Parameter, *, pg_collection: ProcessGroupCollection) -> None:
    """Broadcast a weight from the first data-parallel rank. Experts have a data-parallel group of their own."""
    group = pg_collection.dp_cp if getattr(parameter, "allreduce", True) else pg_collection.expt_dp
    weight = parameter.data.cuda()  # FSDP2 moves a stage only when it shards it, and NCCL needs GPU tensors
    torch.distributed.broadcast(weight, group_src=0, group=group)
    parameter.data.copy_(weight)


def _list_one_bucket_flags(stages: int, options: BuildOptions) -> list[bool]:
    """Return for each stage whether to put all gradients into one bucket.

    Buckets overlap communication with the backward pass, and only the first stage's communication is on the critical
    path.
    """
    return [index > 0 or options.overlap_param_gather_with_optimizer_step for index in range(stages)]


def _wrap_stage(
    stage: MegatronModule,
    pg_collection: ProcessGroupCollection,
    options: BuildOptions,
    *,
    one_bucket: bool,
    share: Share | None,
) -> MegatronModule:
    if options.wrapper is Wrapper.TORCH_FSDP2:
        return wrap_torch_fsdp2(stage, pg_collection, options, one_bucket=one_bucket, share=share)
    if options.wrapper is Wrapper.MEGATRON_FSDP:
        return wrap_megatron_fsdp(stage, pg_collection, options, one_bucket=one_bucket, share=share)
    return wrap_ddp(stage, pg_collection, options, one_bucket=one_bucket)


@contextlib.contextmanager
def _use_side_stream(stage: MegatronModule) -> Iterator[None]:
    """Construct wrappers on a side stream that is synchronised with the current stream before and after.

    With a full-iteration CUDA graph this must be the capture stream, because the autograd nodes that wrappers keep
    remember the stream on which they were created.
    """
    full_iteration = get_model_config(stage).cuda_graph_impl == "full_iteration"
    stream = get_shared_capture_stream() if full_iteration else torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
