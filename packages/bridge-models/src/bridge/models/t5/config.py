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
    """A T5: a ``TransformerConfig`` for the decoder, what differs in the encoder, and what surrounds the two.

    Every field of ``transformer`` is read and written as if it stood here too: ``config.hidden_size = 64`` sets
    ``config.transformer.hidden_size``. The encoder has all of it but the sizes given here.
    """

    builder: ClassVar[str] = "bridge.models.t5.T5ModelBuilder"

    transformer: TransformerConfig
    """The decoder; and, but for its own sizes, the encoder: layout, precision, kinds of layers, initialisers."""

    encoder_num_layers: int | None = None
    """Layers of the encoder; None for as many as the decoder has."""

    encoder_ffn_hidden_size: int | None = None
    """Width of the encoder's feed-forward layers; None for the decoder's."""

    encoder_num_attention_heads: int | None = None
    """Attention heads of the encoder; None for as many as the decoder has."""

    encoder_kv_channels: int | None = None
    """Channels of each of the encoder's attention heads; None for those of the decoder's."""

    encoder_layer_spec: ModuleSpec | Callable[[T5ModelConfig], ModuleSpec] | None = None
    """The encoder's layers: a spec; a function of this configuration that returns one; None for the default choice."""

    decoder_layer_spec: ModuleSpec | Callable[[T5ModelConfig], ModuleSpec] | None = None
    """The decoder's layers, likewise."""

    seq_length: int = 512
    """Longest sequence of the encoder and of the decoder, in tokens; with learned positions, the number of them."""

    share_embeddings_and_output_weights: bool = True
    """Tie the output layer's weight to the embedding's; the output layer then has a bias, as Megatron makes it."""

    position_embedding_type: Literal["learned_absolute", "rope", "relative"] = "learned_absolute"
    """How positions enter the model: relative ones as a bias on the scores of self-attention."""

    relative_attention_num_buckets: int = 32
    """Number of classes that distances are sorted into, each with a bias for each head."""

    relative_attention_max_distance: int = 128
    """Distances from here on are all of one class."""

    def validate(self) -> None:
        """Check what can be checked without process groups; nothing is changed.

        Raises:
            ModelConfigError: A field lacks a value or contradicts another one.
        """
        super().validate()
        if self.restore_modelopt_state:
            raise ModelConfigError(
                "restore_modelopt_state is true, but neither ModelOpt nor Megatron has layers of T5 for it: "
                "set it to false"
            )

    @property
    def encoder_transformer(self) -> TransformerConfig:
        """The encoder as a configuration of its own, made anew each time: changing it changes nothing here."""
        encoder = copy.copy(self.transformer)
        for own, name in _ENCODER_SIZES.items():
            size: int | None = getattr(self, own)
            if size is not None:
                setattr(encoder, name, size)
        encoder.num_query_groups = encoder.num_attention_heads
        # Weights that write to the residual stream are drawn the smaller, the more layers do so.
        if encoder.num_layers != self.transformer.num_layers and _same_partial(
            encoder.output_layer_init_method, _output_init(self.transformer)
        ):
            encoder.output_layer_init_method = _output_init(encoder)
        return encoder


def _output_init(transformer: TransformerConfig) -> partial[object]:
    """How a transformer of plain settings draws the last matrices of its layers, as TransformerConfig derives it."""
    multiplier = 1.0 if transformer.is_hybrid_model else 2.0
    initialiser: partial[object] = scaled_init_method_normal(
        transformer.init_method_std, transformer.num_layers, multiplier=multiplier
    )
    return initialiser


def _same_partial(one: object, other: partial[object]) -> bool:
    return isinstance(one, partial) and (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
