"""Wrapping stages for data parallelism: DDP, Megatron-FSDP, torch FSDP2."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    FullyShardedDataParallel,
    TorchFullyShardedDataParallel,
    param_and_grad_buffer,
)
from megatron.core.full_cuda_graph import get_shared_capture_stream
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer, tag_params_for_buffer_routing
from megatron.core.optimizer.param_layout import FullParamLayout
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_model_config, make_viewless_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bridge.dist.engine.meta import Share, initialise_shards, initialised_by_wrapper
from bridge.dist.engine.options import BuildOptions
from bridge.dist.errors import PreflightError
from bridge.dist.internals import TESTED_THROUGHOUT, TORCH
from bridge.dist.wrapper import Wrapper

# A bucket should be large enough that a ring all-reduce over all ranks is bound by bandwidth, not by latency.
_SMALLEST_BUCKET = 40_000_000
_BUCKET_PER_RANK = 1_000_000
# Megatron-FSDP (megatron-core 0.19.2) derives how much to communicate at once from the mean size of these layers, and
# divides by zero where a model has none. The number is what it takes at least.
_FSDP_UNITS = (TransformerLayer, MambaLayer)
_COMMUNICATION_UNIT = 1_000_000_000
_AVERAGED = "average_gradients_across_tp_domain"


def check_torch(options: BuildOptions) -> None:
    """Check that the installed torch is not too old for the wrapper.

    Raises:
        PreflightError: It is.
    """
    if options.wrapper is Wrapper.TORCH_FSDP2 and TORCH < TESTED_THROUGHOUT:
        needs = f"needs torch 2.11 or later, not {torch.__version__}"
        raise PreflightError([f"{options.wrapper} {needs}: wrap with ddp or megatron-fsdp"])


def check_optimizer_instances(pg_collection: ProcessGroupCollection, options: BuildOptions) -> None:
    """Check that the process groups were made for as many instances of the distributed optimizer as are asked for.

    Raises:
        PreflightError: They were not.
    """
    within = getattr(pg_collection, "intra_dp_cp", None)
    if options.ddp_config is None or not options.ddp_config.use_distributed_optimizer or within is None:
        return
    wanted = options.ddp_config.num_distributed_optimizer_instances
    there = pg_collection.dp_cp.size() // within.size()
    if wanted != there:
        raise PreflightError(
            [
                f"num_distributed_optimizer_instances is {wanted}, the process groups were made for {there}: "
                "make both the same"
            ]
        )


def wrap_data_parallel(
    stages: list[MegatronModule], pg_collection: ProcessGroupCollection, options: BuildOptions
) -> list[MegatronModule]:
    """Wrap each stage as the options say, and make data-parallel ranks start from the same weights if asked for.

    ``options.ddp_config`` is not changed: the wrappers get a copy, with what depends on the stages filled in.

    Raises:
        PreflightError: The wrapper cannot train these stages.
    """
    _check_stages(stages, options)
    options = replace(options, ddp_config=_resolved_ddp_config(stages, pg_collection, options))
    if options.has_layer_wise_layout:
        tag_params_for_buffer_routing(stages)
    share = partial(_broadcast, pg_collection=pg_collection) if options.data_parallel_random_init else None
    if share is not None and options.wrapper is not Wrapper.DDP:
        # Before wrapping: parameters that are sharded afterwards (DTensor) cannot be broadcast.
        for stage in stages:
            for parameter in stage.parameters():
                if not parameter.is_meta:  # those that are still to be initialised are shared then
                    share(parameter)
    with _on_side_stream(stages[0]):
        wrapped = [
            _wrap_stage(stage, pg_collection, options, one_bucket=one_bucket, share=share)
            for stage, one_bucket in zip(stages, _one_bucket_flags(len(stages), options), strict=True)
        ]
    if options.data_parallel_random_init and options.wrapper is Wrapper.DDP:
        for stage in wrapped:
            assert isinstance(stage, DistributedDataParallel)
            stage.broadcast_params()
    return wrapped


def _check_stages(stages: Sequence[MegatronModule], options: BuildOptions) -> None:
    """Refuse what is known to fail with these stages; what their configuration shows is refused before."""
    assert options.ddp_config is not None
    modules = [module for stage in stages for module in stage.modules()]
    tied = any(getattr(module, "share_embeddings_and_output_weights", False) for module in modules)
    if tied and options.wrapper is Wrapper.TORCH_FSDP2:
        # Seen in megatron-core 0.19.2: the tied weight is sharded in one of its uses only.
        raise PreflightError(["torch FSDP2 fails with tied embeddings: untie them, or wrap with ddp or megatron-fsdp"])
    if options.wrapper is Wrapper.MEGATRON_FSDP and any("_weight_mask" in module._buffers for module in modules):
        # Seen in megatron-core 0.19.2 with nvidia-modelopt 0.47: the process dies.
        raise PreflightError(["Megatron-FSDP crashes with weights that ModelOpt masks (sparsity): wrap with ddp"])
    frozen = not all(parameter.requires_grad for stage in stages for parameter in stage.parameters())
    strategy = options.ddp_config.data_parallel_sharding_strategy
    if frozen and options.wrapper is Wrapper.MEGATRON_FSDP and strategy == "optim":
        # Seen in megatron-core 0.19.2: an AttributeError in the first step, which looks for their gradients.
        raise PreflightError(
            [
                "Megatron-FSDP fails with frozen parameters when data_parallel_sharding_strategy is optim: "
                "choose optim_grads, optim_grads_params or no_shard, or wrap with ddp"
            ]
        )


def _resolved_ddp_config(
    stages: Sequence[MegatronModule], pg_collection: ProcessGroupCollection, options: BuildOptions
) -> DistributedDataParallelConfig:
    """Return a copy of the options' configuration with what depends on the stages and on the wrapper filled in."""
    assert options.ddp_config is not None
    resolved = copy.copy(options.ddp_config)
    if options.wrapper is not Wrapper.TORCH_FSDP2:
        resolved.bucket_size = bucket_size(resolved, stages, data_parallel_size=pg_collection.dp_cp.size())
    if options.has_layer_wise_layout:
        resolved.use_distributed_optimizer = True  # reduces to each rank the gradients of its own parameters
    if options.wrapper is Wrapper.MEGATRON_FSDP:
        resolved.use_megatron_fsdp = True  # what Megatron's optimizer looks at
        if not any(isinstance(module, _FSDP_UNITS) for stage in stages for module in stage.modules()):
            resolved.suggested_communication_unit_size = (
                resolved.suggested_communication_unit_size or _COMMUNICATION_UNIT
            )
    return resolved


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


def release_sharded_models() -> None:
    """Take from all models that an FSDP wraps, whose process groups are no more, what would keep those for ever.

    In megatron-core 0.19.2 a model that Megatron-FSDP wraps and its gradient hooks hold each other by way of torch's
    C++, so that Python never frees it. In torch 2.11 DTensor never frees the meshes it computes with, and a mesh holds
    its groups, with their threads and files; 2.15 frees them.
    """
    for wrapped in list(_megatron_fsdp):
        for handle in wrapped.grad_acc_hooks.values():
            handle.remove()
    _megatron_fsdp.clear()
    for mesh in list(_meshes.values()):
        vars(mesh).get("_pg_registry", {}).clear()  # torch 2.6 has none, and holds no groups
    _meshes.clear()


_megatron_fsdp: weakref.WeakSet[Any] = weakref.WeakSet()
_meshes: weakref.WeakValueDictionary[int, DeviceMesh] = weakref.WeakValueDictionary()
"""By identity: meshes of the same ranks are equal."""


def _remember_meshes(meshes: Iterable[DeviceMesh | None]) -> None:
    _meshes.update({id(mesh): mesh for mesh in meshes if mesh is not None})


def _broadcast(parameter: torch.nn.Parameter, *, pg_collection: ProcessGroupCollection) -> None:
    """Give every data-parallel rank the weight of the first; an expert's within its own data-parallel group."""
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
    options: BuildOptions,
    *,
    one_bucket: bool,
    share: Share | None,
) -> MegatronModule:
    assert options.ddp_config is not None
    common: dict[str, Any] = {
        "config": get_model_config(stage),
        "ddp_config": options.ddp_config,
        "module": stage,
        "disable_bucketing": one_bucket,
    }
    if options.wrapper is Wrapper.TORCH_FSDP2:
        wrapped = _wrap_torch_fsdp2(stage, pg_collection, common)
        _remember_meshes(parameter.device_mesh for parameter in stage.parameters() if isinstance(parameter, DTensor))
        initialise_shards(stage, share)
        return wrapped
    if options.wrapper is Wrapper.MEGATRON_FSDP:
        with initialised_by_wrapper(stage, share):
            wrapped = FullyShardedDataParallel(**common, pg_collection=pg_collection)
        _keep_gradient_averaging(wrapped)
        inner: Any = wrapped.module
        _megatron_fsdp.add(inner)
        _remember_meshes((inner.dist_index.device_mesh, inner.dist_index.expt_device_mesh))
        return wrapped
    # Megatron-core 0.19.2 replaces this for all models of the process when one of them is wrapped with
    # reduce_scatter_with_fp32_accumulation; gradients of a later one are then lost. The latest build decides.
    param_and_grad_buffer.dist_reduce_scatter_func = torch.distributed.reduce_scatter_tensor
    if options.ddp_config.use_distributed_optimizer:
        common["full_param_layout"] = _parameter_layout(stage, pg_collection, options, one_bucket=one_bucket)
    return DistributedDataParallel(**common, pg_collection=pg_collection)


def _keep_gradient_averaging(wrapped: FullyShardedDataParallel) -> None:
    """Mark the sharded parameters whose gradients tensor-parallel ranks average, as the whole ones were marked.

    Megatron-FSDP (megatron-core 0.19.2) carries other marks over, and without this one gradients are added up.
    """
    inner: Any = wrapped.module
    for _, parameter in inner.param_and_grad_buffer.optimizer_named_parameters:
        if getattr(parameter.orig_param, _AVERAGED, False):
            setattr(parameter, _AVERAGED, True)


def _wrap_torch_fsdp2(
    stage: MegatronModule, pg_collection: ProcessGroupCollection, common: dict[str, Any]
) -> MegatronModule:
    """Wrap with FSDP2, telling it which layers there are.

    megatron-core 0.19.2 shards the linear layers inside a layer a second time, and fails, unless transformer_impl is
    local. Without Transformer Engine the layers are local whatever the configuration says.
    """
    config = common["config"]
    layers = (module for module in stage.modules() if isinstance(module, TransformerLayer))
    if any(isinstance(module, ColumnParallelLinear) for layer in layers for module in layer.modules()):
        common = common | {"config": copy.copy(config)}
        common["config"].transformer_impl = "local"
    wrapped = TorchFullyShardedDataParallel(**common, process_group=pg_collection.dp_cp)
    wrapped.config = config
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.register_forward_hook(_without_base, prepend=True)
    return wrapped


def _without_base(module: torch.nn.Module, args: object, output: Any) -> Any:
    """Return what a module returns as a tensor that is no view of another, without a copy.

    FSDP2 gathers a module's weights for the backward pass when the gradient of its output comes. It loses sight of a
    view that is changed in place, and gradients are then wrong (torch 2.15 warns). Megatron's embedding and GPT model
    return transposed tensors.
    """
    if isinstance(output, torch.Tensor) and output.requires_grad:
        return make_viewless_tensor(output, requires_grad=True, keep_graph=True)
    return output


def _parameter_layout(
    stage: MegatronModule, pg_collection: ProcessGroupCollection, options: BuildOptions, *, one_bucket: bool
) -> FullParamLayout:
    """Lay out the trainable parameters for the group that the optimizer shards over.

    That is the group within one optimizer instance where there are several instances.
    """
    assert options.ddp_config is not None
    shards = getattr(pg_collection, "intra_dp_cp", None) or pg_collection.dp_cp
    expert_shards = getattr(pg_collection, "intra_expt_dp", None) or pg_collection.expt_dp
    no_buckets = one_bucket or pg_collection.pp.rank() > 0
    optimizer = LayerWiseDistributedOptimizer if options.has_layer_wise_layout else DistributedOptimizer
    layout: FullParamLayout = optimizer.compute_full_param_layout(
        [parameter for parameter in stage.parameters() if parameter.requires_grad],
        None if no_buckets else options.ddp_config.bucket_size,
        shards.size(),
        options.ddp_config,
        expert_data_parallel_world_size=expert_shards.size(),
    )
    return layout


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
