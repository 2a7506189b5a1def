"""The configuration of a T5."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import scaled_init_method_normal

from bridge.models.common.config import LanguageModelConfig
from bridge.models.errors import ModelConfigError

_ENCODER_SIZES = {
    "encoder_num_layers": "num_layers",
    "encoder_ffn_hidden_size": "ffn_hidden_size",
    "encoder_num_attention_heads": "num_attention_heads",
    "encoder_kv_channels": "kv_channels",
}


@dataclass(kw_only=True)
class T5ModelConfig(LanguageModelConfig):
    """Configuration of a T5: a ``TransformerConfig`` for the decoder, encoder overrides, embeddings and output layer.

    Fields of ``transformer`` can be read and written here directly: ``config.hidden_size = 64`` sets
    ``config.transformer.hidden_size``. The encoder shares them, apart from the sizes set here.
    """

    builder: ClassVar[str] = "bridge.models.t5.T5ModelBuilder"

    transformer: TransformerConfig
    """The decoder, and everything that the encoder shares with it: layout, precision, layer types, initialisers."""

    encoder_num_layers: int | None = None
    """Number of encoder layers; None for the decoder's."""

    encoder_ffn_hidden_size: int | None = None
    """Width of the encoder's feed-forward layers; None for the decoder's."""

    encoder_num_attention_heads: int | None = None
    """Number of attention heads of the encoder; None for the decoder's."""

    encoder_kv_channels: int | None = None
    """Channels per attention head of the encoder; None for the decoder's."""

    encoder_layer_spec: ModuleSpec | Callable[[T5ModelConfig], ModuleSpec] | None = None
    """The encoder's layers: a spec, a function of this configuration that returns one, or None for the default."""

    decoder_layer_spec: ModuleSpec | Callable[[T5ModelConfig], ModuleSpec] | None = None
    """The decoder's layers, in the same forms."""

    seq_length: int = 512
    """Maximum sequence length of encoder and decoder, in tokens; with learned positions, the number of positions."""

    share_embeddings_and_output_weights: bool = True
    """Tie the output layer's weight to the embedding's; Megatron's T5 then adds a bias to the output layer."""

    position_embedding_type: Literal["learned_absolute", "rope", "relative"] = "learned_absolute"
    """Type of position embedding; relative positions add a bias to the scores of self-attention."""

    relative_attention_num_buckets: int = 32
    """Number of distance buckets, each with one bias per head."""

    relative_attention_max_distance: int = 128
    """Distances from this one on share the last bucket."""

    def validate(self) -> None:
        """Run the checks that need no process groups, without changing anything.

        Raises:
            ModelConfigError: A required field is missing, or two fields contradict each other.
        """
        super().validate()
        if self.restore_modelopt_state:
            raise ModelConfigError(
                "restore_modelopt_state is true, but neither ModelOpt nor Megatron-Core supports it for T5: "
                "set it to false"
            )

    @property
    def encoder_transformer(self) -> TransformerConfig:
        """The encoder's ``TransformerConfig``: a new copy each time, so changes to it have no effect here."""
        encoder = copy.copy(self.transformer)
        for own, name in _ENCODER_SIZES.items():
            size: int | None = getattr(self, own)
            if size is not None:
                setattr(encoder, name, size)
        encoder.num_query_groups = encoder.num_attention_heads  # T5's encoder has no grouped queries
        # The standard deviation of layers that write to the residual stream depends on the number of layers. Only
        # Megatron's default is recomputed: an initialiser that the user sets is kept.
        if encoder.num_layers != self.transformer.num_layers and _same_partial(
            encoder.output_layer_init_method, _output_init(self.transformer)
        ):
            encoder.output_layer_init_method = _output_init(encoder)
        return encoder


def _output_init(transformer: TransformerConfig) -> partial[object]:
    """Return the output-layer initialiser that TransformerConfig derives by default."""
    # Sublayers per layer that write to the residual stream, as in megatron-core 0.19.2.
    multiplier = 1.0 if transformer.is_hybrid_model else 2.0
    initialiser: partial[object] = scaled_init_method_normal(
        transformer.init_method_std, transformer.num_layers, multiplier=multiplier
    )
    return initialiser


def _same_partial(one: object, other: partial[object]) -> bool:
    return isinstance(one, partial) and (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
