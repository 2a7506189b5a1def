"""Wrap a stage with Megatron-FSDP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig, FullyShardedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_model_config

from bridge.dist.engine import meta
from bridge.dist.engine.options import BuildOptions
from bridge.dist.engine.release import remember_megatron_fsdp, remember_meshes

# Megatron-FSDP (megatron-core 0.19.2) derives its communication unit, in elements, from the mean size of these layers,
# and divides by zero if a model has none. The constant is its minimum.
_UNITS = (TransformerLayer, MambaLayer)
_COMMUNICATION_UNIT = 1_000_000_000
_AVERAGED = "average_gradients_across_tp_domain"


def wrap_megatron_fsdp(
    stage: MegatronModule,
    pg_collection: ProcessGroupCollection,
    options: BuildOptions,
    *,
    one_bucket: bool,
    share: meta.Share | None,
) -> FullyShardedDataParallel:
    """Wrap a stage with Megatron-FSDP. ``share`` is called with each parameter that is initialised meanwhile."""
    assert options.ddp_config is not None
    with meta.initialise_while_wrapping(stage, share):
        wrapped = FullyShardedDataParallel(
            config=get_model_config(stage),
            ddp_config=options.ddp_config,
            module=stage,
            disable_bucketing=one_bucket,
            pg_collection=pg_collection,
        )
    _keep_gradient_averaging(wrapped)
    inner: Any = wrapped.module
    remember_megatron_fsdp(inner)
    remember_meshes((inner.dist_index.device_mesh, inner.dist_index.expt_device_mesh))
    return wrapped


def complete_ddp_config(ddp_config: DistributedDataParallelConfig, stages: Sequence[MegatronModule]) -> None:
    """Set the fields that Megatron-FSDP and Megatron's optimizer read, in place."""
    ddp_config.use_megatron_fsdp = True  # Megatron's optimizer reads it
    if not any(isinstance(module, _UNITS) for stage in stages for module in stage.modules()):
        ddp_config.suggested_communication_unit_size = (
            ddp_config.suggested_communication_unit_size or _COMMUNICATION_UNIT
        )


def _keep_gradient_averaging(wrapped: FullyShardedDataParallel) -> None:
    """Copy the attribute for averaging gradients over tensor-parallel ranks to the sharded parameters.

    Megatron-FSDP (megatron-core 0.19.2) copies other attributes but not this one, and gradients would be summed.
    """
    inner: Any = wrapped.module
    for _, parameter in inner.param_and_grad_buffer.optimizer_named_parameters:
        if getattr(parameter.orig_param, _AVERAGED, False):
            setattr(parameter, _AVERAGED, True)
