"""The pre-flight rules of a T5. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.dist.checks.preflight import MEGATRON, Rule, Setup, rule
from bridge.dist.nearest import divides, suggest
from bridge.dist.wrapper import Wrapper
from bridge.models.common.rules import LANGUAGE_RULES


@rule(observed_in=MEGATRON)
def t5_pipeline(setup: Setup) -> Iterator[str]:
    """The pipeline schedules do not know where the decoder starts, and send only one tensor between stages."""
    if setup.layout.pp > 1:
        yield "T5 cannot be split into pipeline stages: set pp = 1"


@rule(observed_in=MEGATRON)
def t5_context_parallelism(setup: Setup) -> Iterator[str]:
    """Each rank counts positions from zero in its part of a sequence, and cross attention sees only that part."""
    if setup.layout.cp > 1:
        yield "T5 cannot split sequences over context-parallel ranks: set cp = 1"


@rule()
def t5_encoder_divides(setup: Setup) -> Iterator[str]:
    """Each tensor-parallel rank holds whole heads of the encoder, and an equal part of its feed-forward layers."""
    tp = setup.layout.tp
    for name in ("encoder_num_attention_heads", "encoder_ffn_hidden_size"):
        size: int | None = getattr(setup.model, name)
        if size is not None and size % tp:
            nearest = suggest("tp", tp, divides(size), largest=size)
            yield f"{name} = {size} is not a multiple of tp = {tp}: choose {nearest}, or another {name}"


@rule(observed_in=MEGATRON)
def t5_torch_fsdp2_learned_positions(setup: Setup) -> Iterator[str]:
    """T5Model registers its position embedding under two names, so it is sharded twice: a TypeError while wrapping."""
    if setup.is_wrapped_with(Wrapper.TORCH_FSDP2) and _positions(setup) == "learned_absolute":
        yield (
            "torch FSDP2 does not support learned positions in T5: set position_embedding_type to rope or relative, "
            "or wrap with ddp or megatron-fsdp"
        )


@rule(observed_in=MEGATRON)
def t5_recomputed_relative_positions(setup: Setup) -> Iterator[str]:
    """All layers share one bias, so recomputation runs backward through its graph more than once: a RuntimeError in the
    first backward pass.
    """
    config = setup.transformer
    attention = config.recompute_granularity == "full" or "core_attn" in (config.recompute_modules or ())
    if _positions(setup) == "relative" and config.recompute_granularity and attention:
        yield (
            "T5 cannot recompute attention with relative positions: set recompute_granularity = None, or selective "
            "without core_attn in recompute_modules, or position_embedding_type = rope"
        )


def _positions(setup: Setup) -> str | None:
    return getattr(setup.model, "position_embedding_type", None)


T5_RULES: tuple[Rule, ...] = (
    *LANGUAGE_RULES,
    t5_pipeline,
    t5_context_parallelism,
    t5_encoder_divides,
    t5_torch_fsdp2_learned_positions,
    t5_recomputed_relative_positions,
)
