"""A transformer configuration with YaRN's fields, which megatron-core 0.19.2 reads but does not declare."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.models.errors import ModelConfigError


@dataclass
class YarnTransformerConfig(TransformerConfig):
    """A transformer for ``position_embedding_type: yarn``, which scales rotary frequencies as YaRN does.

    See https://arxiv.org/abs/2309.00071. GPTModel and HybridModel read these fields. Their attention applies
    ``yarn_rotary_scaling_factor`` whatever the type of positions, so leave it at 1 for types other than yarn.
    """

    yarn_rotary_scaling_factor: float = 1.0
    """Ratio of the maximum sequence length to that of pre-training."""

    yarn_original_max_position_embeddings: int = 4096
    """Maximum sequence length of pre-training, in tokens."""

    yarn_beta_fast: float = 32.0
    """Channels with more rotations than this over a sequence of pre-training keep their frequency."""

    yarn_beta_slow: float = 1.0
    """Channels with fewer rotations than this are scaled by the full factor."""

    yarn_mscale: float | None = None
    """Sines and cosines are multiplied by 0.1 x ``yarn_mscale`` x ln(factor) + 1, and divided by the same expression
    with ``yarn_mscale_all_dim``. None: they are multiplied by 0.1 x ln(factor) + 1."""

    yarn_mscale_all_dim: float | None = None
    """See ``yarn_mscale``."""

    yarn_correction_range_round_to_int: bool = True
    """Round the first and last channel of the interpolated range to integers."""


def check_yarn(position_embedding_type: str, transformer: TransformerConfig) -> None:
    """Check that a transformer has the fields that megatron-core reads for ``position_embedding_type: yarn``.

    Raises:
        ModelConfigError: It does not.
    """
    if position_embedding_type == "yarn" and not hasattr(transformer, "yarn_rotary_scaling_factor"):
        raise ModelConfigError(
            f"position_embedding_type yarn requires fields yarn_*, which {type(transformer).__name__} does not have: "
            "use a YarnTransformerConfig of bridge.models.common.yarn (in a document, the _target_ "
            "bridge.models.transformer.YarnTransformerConfig), or set another position_embedding_type"
        )
