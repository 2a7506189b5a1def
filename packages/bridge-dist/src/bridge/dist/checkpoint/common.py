"""What a checkpoint holds that is not split over ranks, in the form of megatron.training."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron.core.transformer import TransformerConfig

from bridge.config import ModelConfig


def make_common_state(
    model: ModelConfig,
    config: TransformerConfig,
    *,
    step: int,
    samples: int,
    world_size: int = 1,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    distributed_optimizer: bool = False,
    **others: bool,
) -> dict[str, Any]:
    """Return the common state that ``load_checkpoint`` of megatron.training reads (0.19.2).

    Args:
        model: The configuration of the model.
        config: That of its layers.
        step: Training steps taken.
        samples: Samples trained on.
        world_size: Ranks that save.
        tp: The tensor-parallel size.
        pp: The pipeline-parallel size.
        dp: The data-parallel size.
        distributed_optimizer: Whether the optimizer is Megatron's distributed one.
        others: Further arguments of megatron.training, such as ``no_save_optim``.
    """
    arguments = Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        hybrid_layer_pattern=_find_layer_pattern(model, config),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
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


def _find_layer_pattern(model: ModelConfig, config: TransformerConfig) -> str | None:
    """Return the layers of a hybrid model, by which megatron.training tells it from a GPT; None for other models."""
    if not hasattr(model, "hybrid_layer_pattern"):
        return None
    return model.hybrid_layer_pattern or "M" * config.num_layers
