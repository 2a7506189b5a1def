"""The data-parallel wrappers and their default options. Importing this module does not import torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Protocol


class Wrapper(StrEnum):
    """The data-parallel wrapper of a stage, in the order of `--help`."""

    DDP = "ddp"
    """Megatron-Core's DistributedDataParallel: each rank holds the weights of its stages."""

    MEGATRON_FSDP = "megatron-fsdp"
    """Megatron-FSDP: the options say what it shards over the data-parallel ranks."""

    TORCH_FSDP2 = "torch-fsdp2"
    """PyTorch's fully_shard: every weight is sharded over the data-parallel ranks."""

    NONE = "none"
    """No wrapper: gradients are not averaged over ranks."""


class ShardingStrategy(StrEnum):
    """What Megatron-FSDP shards over the data-parallel ranks, by Megatron's names."""

    NO_SHARD = "no_shard"
    """Nothing."""

    OPTIM = "optim"
    """The optimizer's state and the full-precision weights."""

    OPTIM_GRADS = "optim_grads"
    """The gradients as well."""

    OPTIM_GRADS_PARAMS = "optim_grads_params"
    """The weights as well."""


def resolve_sharding_strategy(wrapper: Wrapper, strategy: ShardingStrategy | None) -> ShardingStrategy | None:
    """Return the strategy of Megatron-FSDP, by default the one that shards everything; None with other wrappers."""
    if wrapper is not Wrapper.MEGATRON_FSDP:
        return None
    return strategy or ShardingStrategy.OPTIM_GRADS_PARAMS


class Precision(Protocol):
    """The fields of TransformerConfig that say how a model computes and keeps its weights."""

    bf16: bool
    fp16: bool
    fp8_param: bool
    fp4_param: bool

    @property
    def fp8_recipe(self) -> str | None: ...


def make_default_ddp_options(
    wrapper: Wrapper,
    config: Precision,
    *,
    distributed_optimizer: bool,
    sharding_strategy: ShardingStrategy | None,
    on_gpu: bool,
) -> dict[str, Any]:
    """Return the fields of DistributedDataParallelConfig that `bridge build` sets for a wrapper.

    Args:
        wrapper: Any but ``none``.
        config: The transformer's configuration.
        distributed_optimizer: Whether DDP shards the optimizer's state.
        sharding_strategy: What Megatron-FSDP shards; None for its default.
        on_gpu: Whether the backend is NCCL.
    """
    fsdp = wrapper is Wrapper.MEGATRON_FSDP
    strategy = resolve_sharding_strategy(wrapper, sharding_strategy) or ShardingStrategy.NO_SHARD
    in_mxfp8 = config.fp8_param and config.fp8_recipe == "mxfp8"
    return {
        "grad_reduce_in_fp32": config.bf16 or config.fp16,
        "check_for_nan_in_grad": not config.fp16,  # with fp16 the loss scaler handles overflows
        "use_distributed_optimizer": fsdp or distributed_optimizer,  # Megatron-FSDP fails without it
        "fp8_param_gather": config.fp8_param,
        "fp4_param_gather": config.fp4_param,
        # Transformer Engine cannot move weights in MXFP8 into a buffer of DDP.
        "reuse_grad_buf_for_mxfp8_param_ag": in_mxfp8 and wrapper is Wrapper.DDP and distributed_optimizer,
        # Megatron-FSDP sets it in any case. Set here, gradients get buckets, which are reduced during the backward pass
        # instead of after it.
        "overlap_grad_reduce": strategy is ShardingStrategy.OPTIM_GRADS,
        "use_megatron_fsdp": fsdp,
        "data_parallel_sharding_strategy": str(strategy),
        "gradient_reduce_div_fusion": on_gpu,  # gloo has no fused division
    }
