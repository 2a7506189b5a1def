"""Set up Megatron's optimizer for short runs whose results are comparable between layouts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import MegatronModule
from megatron.core.utils import get_model_config

from bridge.dist.patch import Replacement, replace_attributes

LEARNING_RATE = 1e-4
# Adam's epsilon: far above the rounding noise of gradients that are mathematically zero (an attention key's bias, for
# example), which Adam would otherwise scale up to a full step in an arbitrary direction; far below real gradients.
_EPSILON = 1e-5
_FP16_LOSS_SCALE = 2.0**16  # megatron-core's default, 2**32, overflows: the first steps would be skipped


@contextlib.contextmanager
def set_up_optimizer(stages: list[MegatronModule], *, use_gloo_process_groups: bool = True) -> Iterator[Any]:
    """Yield Megatron's Adam with a constant learning rate; temporarily set Megatron's schedule callbacks on the config.

    The callbacks are removed afterwards, because otherwise configuration, distributed optimizer and stages would form
    a reference cycle through torch's C++, which Python never frees.
    """
    config = get_model_config(stages[0])
    ddp_config = stages[0].ddp_config
    assert isinstance(ddp_config, DistributedDataParallelConfig)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            min_lr=LEARNING_RATE,
            adam_eps=_EPSILON,
            fp16=config.fp16,
            bf16=config.bf16,
            initial_loss_scale=_FP16_LOSS_SCALE,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=ddp_config.use_distributed_optimizer,
            overlap_param_gather=ddp_config.overlap_param_gather,
            reuse_grad_buf_for_mxfp8_param_ag=ddp_config.reuse_grad_buf_for_mxfp8_param_ag,
        ),
        stages,
        use_gloo_process_groups=use_gloo_process_groups,
    )
    for group in optimizer.param_groups:  # a scheduler would set it; there is none
        group["lr"] = LEARNING_RATE
    functions: dict[str, object] = {
        "finalize_model_grads_func": finalize_model_grads,
        "grad_scale_func": optimizer.scale_loss,
    }
    if ddp_config.overlap_grad_reduce:
        no_sync = [stage.no_sync for stage in stages]
        functions["no_sync_func"] = no_sync if len(stages) > 1 else no_sync[0]
    with replace_attributes(*(Replacement(config, name, function) for name, function in functions.items())):
        yield optimizer
