"""T5: its configuration, and the builder that makes Megatron-Core's T5Model from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, cast

import torch
from megatron.core import parallel_state
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import scaled_init_method_normal
from torch.distributed import get_process_group_ranks

from bridge.dist import DistributedModelBuilder
from bridge.models.backend.choice import Refusals, refuse, uses_transformer_engine, wants_pytorch_attention
from bridge.models.common.config import LanguageModelConfig
from bridge.models.errors import ModelConfigError, UnsupportedError
from bridge.models.t5.rules import T5_RULES
from bridge.models.t5_layers import decoder_layer_spec, encoder_layer_spec

_ENCODER_SIZES = {
    "encoder_num_layers": "num_layers",
    "encoder_ffn_hidden_size": "ffn_hidden_size",
    "encoder_num_attention_heads": "num_attention_heads",
    "encoder_kv_channels": "kv_channels",
}
_HIDE_EVERY = 7
_HIDDEN = 0

# What T5Model of megatron-core 0.19.2 passes over, in silence or until the first forward pass.
_BEYOND_T5: Refusals = {
    "multi-token prediction": (lambda c: bool(c.mtp_num_layers), "set transformer.mtp_num_layers to null"),
    "scaling of logits by µP": (lambda c: c.use_mup, "set transformer.use_mup to false"),
    "gates on attention": (lambda c: c.attention_output_gate, "set transformer.attention_output_gate to false"),
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


class T5ModelBuilder(DistributedModelBuilder[T5Model, T5ModelConfig]):
    """Builds ``T5Model`` from a ``T5ModelConfig``.

    Example:
        >>> transformer = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
        >>> config = T5ModelConfig(transformer=transformer, vocab_size=256, position_embedding_type="relative")
        >>> (model,) = T5ModelBuilder(config).build_distributed_models(pg_collection, ddp_config)
        >>> losses = model(encoder_tokens, decoder_tokens, None, None, None, lm_labels=labels)  # [batch, sequence]
    """

    rules = T5_RULES

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> T5Model:
        """Build the model, neither wrapped nor moved to a device.

        Args:
            pg_collection: The process groups of this rank.
            pre_process: Whether the model holds the embedding; None for yes.
            post_process: Whether the model holds the output layer; None for yes.
            vp_stage: None: there is no virtual pipeline.

        Raises:
            ModelConfigError: The configuration does not describe a model.
            UnsupportedError: The layers at hand cannot build what the configuration asks for; or a pipeline is asked
                for, or process groups are given that are not Megatron's global ones.
            LayerSpecError: A layer spec is not, or does not return, one.
        """
        config = self._model_config
        config.validate()
        if vp_stage is not None or pg_collection.pp.size() > 1:
            raise UnsupportedError(
                "T5 cannot be split into pipeline stages: set transformer.pipeline_model_parallel_size to 1, and pass "
                "no vp_stage"
            )
        refuse(config.transformer, _BEYOND_T5, layers="Megatron's T5")
        _check_groups(pg_collection)
        return T5Model(
            config=config.transformer,
            encoder_config=config.encoder_transformer,
            # T5Model takes the specs of whole blocks too, but megatron-core 0.19.2 types them as ModuleSpec only.
            transformer_encoder_layer_spec=cast(ModuleSpec, encoder_layer_spec(config)),
            transformer_decoder_layer_spec=cast(ModuleSpec, decoder_layer_spec(config)),
            vocab_size=config.padded_vocab_size,
            max_sequence_length=config.seq_length,
            pre_process=pre_process is not False,
            post_process=post_process is not False,
            fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
            parallel_output=config.parallel_output,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            relative_attention_num_buckets=config.relative_attention_num_buckets,
            relative_attention_max_distance=config.relative_attention_max_distance,
            pg_collection=pg_collection,
        )

    def forward_step(
        self, stage: MegatronModule, tokens: torch.Tensor, pg_collection: ProcessGroupCollection
    ) -> torch.Tensor:
        """Have the model restore a text of which every seventh token is hidden; see ``DistributedModelBuilder``.

        The encoder reads the tokens with the hidden ones as token 0; the decoder predicts each from those before it.

        Returns:
            A loss for each token, shape [microbatch, sequence].
        """
        shown, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        hidden = torch.arange(1, shown.shape[1] + 1, device=shown.device) % _HIDE_EVERY == 0
        encoder_mask, cross_mask = self._masks_of_nothing(shown)
        losses: torch.Tensor = stage(
            shown.masked_fill(hidden, _HIDDEN), shown, encoder_mask, None, cross_mask, lm_labels=labels
        )
        return losses

    def _masks_of_nothing(
        self, tokens: torch.Tensor
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None]:
        """Masks, of the encoder and of cross attention, for sequences without padding: TE wants to see them."""
        transformer = self.transformer_config
        if wants_pytorch_attention(transformer) or not uses_transformer_engine(transformer):
            return None, None
        nothing = torch.zeros_like(tokens, dtype=torch.bool)[:, None, None]
        return nothing, (nothing, nothing)


def _check_groups(pg_collection: ProcessGroupCollection) -> None:
    """Check that the tensor-parallel ranks are those that Megatron knows of, which cross attention goes by.

    Seen in megatron-core 0.19.2.
    """
    known = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
    if known is None or get_process_group_ranks(known) != get_process_group_ranks(pg_collection.tp):
        raise UnsupportedError(
            "T5's cross attention takes Megatron's global process groups, whatever it is given: create them for this "
            "layout (bridge.dist.create_process_groups), and pass those"
        )
