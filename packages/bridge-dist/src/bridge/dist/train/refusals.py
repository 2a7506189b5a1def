"""Refuse configurations that a training run does not support, or that train differently under another layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from megatron.core.transformer import TransformerConfig

from bridge.config import ModelConfig
from bridge.dist.errors import TrainingError
from bridge.dist.wrapper import Wrapper

_UNSUPPORTED: Mapping[str, tuple[Callable[[TransformerConfig], object], str]] = {
    "overlap_moe_expert_parallel_comm": (
        lambda c: c.overlap_moe_expert_parallel_comm,
        "set it and delay_wgrad_compute to false, because it needs forward steps that return a schedule plan",
    ),
    "num_microbatches_with_partial_activation_checkpoints": (
        lambda c: c.num_microbatches_with_partial_activation_checkpoints is not None,
        "set it to null, because it needs forward steps that accept what to recompute",
    ),
    "qk_clip": (lambda c: c.qk_clip, "set it to false, because these steps do not clip weights"),
    "log_max_attention_logit": (
        lambda c: c.log_max_attention_logit,
        "set it to false, because these steps do not log it",
    ),
    "moe_expert_rank_capacity_factor": (
        lambda c: c.moe_expert_rank_capacity_factor is not None,
        "set it to null and moe_paged_stash to false, because these steps are not repeated when tokens are dropped",
    ),
    "cuda_graph_impl": (
        lambda c: c.cuda_graph_impl in ("transformer_engine", "full_iteration"),
        "set it to local or none, because these steps do not capture graphs",
    ),
}
"""Features that megatron-core 0.19.2 leaves to the training loop and ``train`` does not implement.

Maps a field to the condition under which it is in use, and to what to set instead.
"""


def find_unsupported_fields(config: TransformerConfig) -> Iterator[tuple[str, str]]:
    """Yield the fields of a configuration that ``train`` would ignore or fail on, each with what to set."""
    for name, (is_used, advice) in _UNSUPPORTED.items():
        if is_used(config):
            yield name, advice


def check_training(
    wrapper: Wrapper, config: ModelConfig, transformer: TransformerConfig, *, draws_weights: bool
) -> None:
    """Check that ``train`` supports a configuration, and that it trains the same under every layout.

    Raises:
        TrainingError: Lists every problem, each with what to set.
    """
    problems = {
        "--wrap none: training needs a data-parallel wrapper, which reduces the gradients": wrapper is Wrapper.NONE,
        "calculate_per_token_loss: set it to false, because the loss is the mean over all tokens": (
            transformer.calculate_per_token_loss
        ),
        "parallel_output = false: set it to true, because the loss is computed from split logits": (
            not getattr(config, "parallel_output", True)
        ),
        "init_model_with_meta_device: set it to false, because weights are drawn before wrapping": (
            transformer.init_model_with_meta_device and draws_weights
        ),
    }
    problems |= {f"{field}: {advice}": True for field, advice in find_unsupported_fields(transformer)}
    if reasons := [reason for reason, applies in problems.items() if applies]:
        raise TrainingError("\n".join(f"cannot train with {reason}" for reason in reasons))
