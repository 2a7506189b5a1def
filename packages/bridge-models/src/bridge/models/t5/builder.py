"""The builder of a T5."""

from __future__ import annotations

from typing import cast

import torch
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec

from bridge.dist import DistributedModelBuilder
from bridge.models.backend.choice import (
    Limitations,
    check_limitations,
    uses_transformer_engine,
    wants_pytorch_attention,
)
from bridge.models.common.groups import check_global_groups
from bridge.models.errors import UnsupportedError
from bridge.models.t5.config import T5ModelConfig
from bridge.models.t5.layers import decoder_layer_spec, encoder_layer_spec
from bridge.models.t5.rules import T5_RULES

_MASK_EVERY = 7  # about the 15 % of tokens that T5's pre-training masks
_MASK_TOKEN = 0

# T5Model of megatron-core 0.19.2 silently ignores these features, or fails in the first forward pass.
_MODEL_LIMITATIONS: Limitations = {
    "multi-token prediction": (lambda c: bool(c.mtp_num_layers), "set transformer.mtp_num_layers to null"),
    "scaling of logits by µP": (lambda c: c.use_mup, "set transformer.use_mup to false"),
    "attention output gates": (lambda c: c.attention_output_gate, "set transformer.attention_output_gate to false"),
}


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
            vp_stage: Must be None: T5 has no virtual pipeline.

        Raises:
            ModelConfigError: The configuration is invalid.
            UnsupportedError: The available layers do not support the configuration, there is more than one pipeline
                stage, or the process groups are not Megatron's global ones.
            LayerSpecError: A layer spec is not a spec and does not return one.
        """
        config = self._model_config
        config.validate()
        if vp_stage is not None or pg_collection.pp.size() > 1:
            raise UnsupportedError(
                "T5 cannot be split into pipeline stages: set transformer.pipeline_model_parallel_size to 1, and pass "
                "no vp_stage"
            )
        check_limitations(config.transformer, _MODEL_LIMITATIONS, layers="Megatron's T5")
        # Cross attention of megatron-core 0.19.2 ignores pg_collection.
        check_global_groups(pg_collection, component="T5's cross attention")
        return T5Model(
            config=config.transformer,
            encoder_config=config.encoder_transformer,
            # T5Model also accepts block specs, but megatron-core 0.19.2 annotates only ModuleSpec.
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
        """Compute the loss of restoring a text with every seventh token masked; see ``DistributedModelBuilder``.

        The encoder reads the tokens, in which 0 replaces masked ones. The decoder predicts each token from the previous
        ones and the encoder's output.

        Returns:
            A loss for each token, shape [microbatch, sequence].
        """
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        is_masked = torch.arange(1, inputs.shape[1] + 1, device=inputs.device) % _MASK_EVERY == 0
        encoder_mask, cross_mask = self._no_padding_masks(inputs)
        losses: torch.Tensor = stage(
            inputs.masked_fill(is_masked, _MASK_TOKEN), inputs, encoder_mask, None, cross_mask, lm_labels=labels
        )
        return losses

    def logits_step(
        self, stage: MegatronModule, tokens: torch.Tensor, pg_collection: ProcessGroupCollection
    ) -> torch.Tensor:
        """Compute logits with the same tokens in encoder and decoder; see ``DistributedModelBuilder``."""
        encoder_mask, cross_mask = self._no_padding_masks(tokens)
        logits: torch.Tensor = stage(tokens, tokens, encoder_mask, None, cross_mask)
        return logits

    def _no_padding_masks(
        self, tokens: torch.Tensor
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None]:
        """Return the masks of encoder and cross attention for sequences without padding.

        Transformer Engine requires masks; attention in PyTorch does without.
        """
        transformer = self.transformer_config
        if wants_pytorch_attention(transformer) or not uses_transformer_engine(transformer):
            return None, None
        no_padding = torch.zeros_like(tokens, dtype=torch.bool)[:, None, None]
        return no_padding, (no_padding, no_padding)
