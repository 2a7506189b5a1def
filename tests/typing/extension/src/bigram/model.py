"""A model family of its own: configuration, module, builder, and a hook."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding, vocab_parallel_cross_entropy
from megatron.core.transformer import MegatronModule, TransformerConfig

from bigram.rules import RULES
from bridge.builders import EmbedsTransformer
from bridge.config import ModelConfig
from bridge.dist import DistributedModelBuilder


@dataclass
class LossConfig:
    """A configuration within the configuration: a mapping in a document."""

    temperature: float = 1.0


@dataclass(kw_only=True)
class BigramConfig(EmbedsTransformer, ModelConfig):
    """The description, as data; the fields of `transformer` are read and written as if they stood here too."""

    builder: ClassVar[str] = "bigram.BigramBuilder"

    transformer: TransformerConfig
    vocab_size: int
    seq_length: int = 64
    loss: LossConfig = field(default_factory=LossConfig)


class BigramModel(MegatronModule):
    """The module: an embedding and an output layer, both split over the tensor-parallel ranks."""

    def __init__(self, config: BigramConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config.transformer)
        self.loss = config.loss
        size, hidden, init_method = config.vocab_size, config.hidden_size, config.init_method
        assert init_method is not None  # TransformerConfig fills it in
        self.word_embeddings = VocabParallelEmbedding(
            size, hidden, init_method=init_method, config=config.transformer, tp_group=pg_collection.tp
        )
        self.output_layer = ColumnParallelLinear(
            hidden, size, config=config.transformer, init_method=init_method, bias=False, tp_group=pg_collection.tp
        )

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        """Megatron's schedule gives each stage what the one before it made; this model is a single stage."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of each token, [batch, sequence]."""
        logits, _ = self.output_layer(self.word_embeddings(input_ids))
        losses: torch.Tensor = vocab_parallel_cross_entropy(logits.float() / self.loss.temperature, labels)
        return losses


class BigramBuilder(DistributedModelBuilder[BigramModel, BigramConfig]):
    """The builder: how a stage is made, how it is run, and what is known not to work."""

    rules = RULES

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> BigramModel:
        """Build the model; without a pipeline it has one stage."""
        return BigramModel(self._model_config, pg_collection)

    def forward_step(
        self, stage: MegatronModule, tokens: torch.Tensor, pg_collection: ProcessGroupCollection
    ) -> torch.Tensor:
        """Run the model on a microbatch, [microbatch, sequence + 1]; it takes neither positions nor a mask."""
        losses: torch.Tensor = stage(tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous())
        return losses


def freeze_embedding(stages: list[MegatronModule]) -> list[MegatronModule]:
    """Keep the embedding as it is; a hook for `pre_wrap_hooks`."""
    for stage in stages:
        assert isinstance(stage, BigramModel)
        stage.word_embeddings.requires_grad_(False)
    return stages
