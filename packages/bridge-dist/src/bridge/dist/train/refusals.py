"""What a training run cannot do, or would compute differently under another layout, and refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from megatron.core.transformer import TransformerConfig

from bridge.config import ModelConfig
from bridge.dist.errors import TrainingError
from bridge.dist.wrapper import Wrapper

_UNSUPPORTED: Mapping[str, tuple[Callable[[TransformerConfig], object], str]] = {
    "overlap_moe_expert_parallel_comm": (
        lambda c: c.overlap_moe_expert_parallel_comm,
        "set it, and delay_wgrad_compute, to false: it takes steps that return plans of a schedule",
    ),
    "num_microbatches_with_partial_activation_checkpoints": (
        lambda c: c.num_microbatches_with_partial_activation_checkpoints is not None,
        "set it to null: it takes steps that are told what to recompute",
    ),
    "qk_clip": (lambda c: c.qk_clip, "set it to false: nothing clips the weights after a step"),
    "log_max_attention_logit": (lambda c: c.log_max_attention_logit, "set it to false: nothing logs it"),
    "moe_expert_rank_capacity_factor": (
        lambda c: c.moe_expert_rank_capacity_factor is not None,
        "set it to null, and moe_paged_stash to false: nothing repeats a step that dropped tokens",
    ),
    "cuda_graph_impl": (
        lambda c: c.cuda_graph_impl in ("transformer_engine", "full_iteration"),
        "set it to local or none: nothing captures the graphs",
    ),
}
"""What megatron-core 0.19.2 leaves to the training loop, and the one here does not do."""


def find_unsupported_fields(config: TransformerConfig) -> Iterator[tuple[str, str]]:
    """Name the fields of a configuration that ``train`` would pass over, or fail for, each with what to set."""
    for name, (asked, advice) in _UNSUPPORTED.items():
        if asked(config):
            yield name, advice


def check_training(wrapper: Wrapper, config: ModelConfig, transformer: TransformerConfig) -> None:
    """Refuse what the training run cannot do, or would compute differently under another layout.

    Raises:
        TrainingError: Says what to change.
    """
    refused = {
        "--wrap none: training needs a data-parallel wrapper, which reduces the gradients": wrapper is Wrapper.NONE,
        "calculate_per_token_loss: set it to false, the loss is the mean over all tokens": (
            transformer.calculate_per_token_loss
        ),
        "parallel_output = false: set it to true, the loss is computed from split logits": (
            not getattr(config, "parallel_output", True)
        ),
        "init_model_with_meta_device: set it to false, weights are drawn before they are wrapped": (
            transformer.init_model_with_meta_device
        ),
    }
    refused |= {f"{field}: {advice}": True for field, advice in find_unsupported_fields(transformer)}
    if broken := [reason for reason, applies in refused.items() if applies]:
        raise TrainingError("\n".join(f"cannot train with {reason}" for reason in broken))
