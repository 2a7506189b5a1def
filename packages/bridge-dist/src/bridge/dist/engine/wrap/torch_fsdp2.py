"""Wrap a stage with torch FSDP2, through Megatron's wrapper for it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.distributed import TorchFullyShardedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_model_config, make_viewless_tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bridge.dist.engine import meta
from bridge.dist.engine.options import BuildOptions
from bridge.dist.engine.release import remember_meshes


def wrap_torch_fsdp2(
    stage: MegatronModule,
    pg_collection: ProcessGroupCollection,
    options: BuildOptions,
    *,
    one_bucket: bool,
    share: meta.Share | None,
) -> TorchFullyShardedDataParallel:
    """Wrap a stage with FSDP2. ``share`` is called with each parameter that is initialised afterwards.

    Unless transformer_impl is local, megatron-core 0.19.2 shards the linear layers inside a transformer layer a second
    time, and fails. Without Transformer Engine the layers are local whatever the configuration says, so the wrapper
    gets a copy of the configuration that says so.
    """
    assert options.ddp_config is not None
    config = wrapper_config = get_model_config(stage)
    layers = (module for module in stage.modules() if isinstance(module, TransformerLayer))
    if any(isinstance(module, ColumnParallelLinear) for layer in layers for module in layer.modules()):
        wrapper_config = copy.copy(config)
        wrapper_config.transformer_impl = "local"
    wrapped = TorchFullyShardedDataParallel(
        config=wrapper_config,
        ddp_config=options.ddp_config,
        module=stage,
        disable_bucketing=one_bucket,
        process_group=pg_collection.dp_cp,
    )
    wrapped.config = config
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.register_forward_hook(_make_viewless, prepend=True)
    remember_meshes(parameter.device_mesh for parameter in stage.parameters() if isinstance(parameter, DTensor))
    meta.initialise_shards(stage, share)
    return wrapped


def _make_viewless(module: torch.nn.Module, args: object, output: Any) -> Any:
    """Return a module's output as a tensor that is not a view, without a copy.

    FSDP2 gathers a module's weights for the backward pass when the gradient of its output arrives. It loses track of a
    view that is changed in place, and gradients are then wrong (torch 2.15 warns). Megatron's embedding and GPT model
    return transposed views.
    """
    if isinstance(output, torch.Tensor) and output.requires_grad:
        return make_viewless_tensor(output, requires_grad=True, keep_graph=True)
    return output
