"""A transformer configuration with YaRN's fields, which megatron-core 0.19.2 reads from one, and does not declare."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.models.errors import ModelConfigError


@dataclass
class YarnTransformerConfig(TransformerConfig):
    """A transformer for ``position_embedding_type: yarn``: rotary frequencies stretched as YaRN does.

    See https://arxiv.org/abs/2309.00071. GPTModel and HybridModel read these fields, and their attention goes by
    ``yarn_rotary_scaling_factor`` whatever the positions are: with others, leave it at 1.
    """

    yarn_rotary_scaling_factor: float = 1.0
    """By how much sequences may be longer than those of pre-training."""

    yarn_original_max_position_embeddings: int = 4096
    """Longest sequence of pre-training, in tokens."""

    yarn_beta_fast: float = 32.0
    """Channels that rotate more often than this over a sequence of pre-training keep their frequency."""

    yarn_beta_slow: float = 1.0
    """Channels that rotate less often than this are slowed down by the whole factor."""

    yarn_mscale: float | None = None
    """Sines and cosines are multiplied by 0.1 x this x ln(factor) + 1, and divided by the same of
    ``yarn_mscale_all_dim``; None for 0.1 ln(factor) + 1 alone."""

    yarn_mscale_all_dim: float | None = None
    """See ``yarn_mscale``."""

    yarn_correction_range_round_to_int: bool = True
    """Round the channels where the frequencies begin and end to change to whole ones."""


def check_yarn(position_embedding_type: str, transformer: TransformerConfig) -> None:
    """Check that a transformer has the fields that its model reads for ``position_embedding_type: yarn``.

    Raises:
        ModelConfigError: It does not.
    """
    if position_embedding_type == "yarn" and not hasattr(transformer, "yarn_rotary_scaling_factor"):
        raise ModelConfigError(
            f"position_embedding_type yarn needs the fields yarn_*, which {type(transformer).__name__} does not have: "
            "make it a bridge.models.transformer.YarnTransformerConfig, or set another position_embedding_type"
        )
