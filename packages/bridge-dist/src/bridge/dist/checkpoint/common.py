"""What a checkpoint holds that is not split over ranks, in the form of megatron.training."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron.core.transformer import TransformerConfig


def make_common_state(
    config: TransformerConfig,
    *,
    step: int,
    samples: int,
    world_size: int = 1,
    tensor: int = 1,
    pipeline: int = 1,
    data: int = 1,
    distributed_optimizer: bool = False,
    **others: bool,
) -> dict[str, Any]:
    """Return the common state that ``load_checkpoint`` of megatron.training reads (0.19.2).

    Args:
        config: The configuration of the model.
        step: Training steps taken.
        samples: Samples trained on.
        world_size: Ranks that save.
        tensor: The tensor-parallel size.
        pipeline: The pipeline-parallel size.
        data: The data-parallel size.
        distributed_optimizer: Whether the optimizer is Megatron's distributed one.
        others: Further arguments of megatron.training, such as ``no_save_optim``.
    """
    arguments = Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        data_parallel_size=data,
        world_size=world_size,
        data_parallel_random_init=False,
        use_distributed_optimizer=distributed_optimizer,
        ckpt_fully_parallel_save=True,
        consumed_train_samples=samples,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        **others,
    )
    return {
        "args": arguments,
        "checkpoint_version": 3.0,  # that of all checkpoints since Megatron-LM 3
        "iteration": step,
        "num_floating_point_operations_so_far": 0,
    }
