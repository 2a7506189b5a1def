"""The data-parallel wrappers and their default options. Importing this module does not import torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Any


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


def make_default_ddp_options(
    wrapper: Wrapper, *, bf16: bool, fp16: bool, distributed_optimizer: bool, on_gpu: bool
) -> dict[str, Any]:
    """Return the fields of DistributedDataParallelConfig that `bridge build` sets for a wrapper.

    Args:
        wrapper: Any but ``none``.
        bf16: Whether the model computes in bf16.
        fp16: Whether it computes in fp16.
        distributed_optimizer: Whether to shard the optimizer's state; Megatron-FSDP always does.
        on_gpu: Whether the backend is NCCL.
    """
    fsdp = wrapper is Wrapper.MEGATRON_FSDP
    return {
        "grad_reduce_in_fp32": bf16 or fp16,
        "check_for_nan_in_grad": not fp16,  # with fp16 the loss scaler handles overflows
        "use_distributed_optimizer": fsdp or distributed_optimizer,
        "use_megatron_fsdp": fsdp,
        "data_parallel_sharding_strategy": "optim_grads_params" if fsdp else "no_shard",
        "gradient_reduce_div_fusion": on_gpu,  # gloo has no fused division
    }
