"""The job of `bridge build`: plain data that is sent to every rank and checked before the ranks meet."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer import MegatronModule, TransformerConfig

from bridge.config import ModelConfig
from bridge.dist.checkpoint.folder import find_iteration
from bridge.dist.checks.preflight import Setup, check
from bridge.dist.checks.rules import RULES
from bridge.dist.engine.builder import DistributedModelBuilder
from bridge.dist.engine.environment import disable_cuda_graphs, inspect_process
from bridge.dist.engine.options import BuildOptions
from bridge.dist.errors import BuilderContractError, TrainingError
from bridge.dist.layout import Layout, find_embedding_ranks
from bridge.dist.train.refusals import check_training
from bridge.dist.train.step import TrainOptions
from bridge.dist.train.text import Text
from bridge.dist.wrapper import ShardingStrategy, Wrapper, make_default_ddp_options


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """One build, as plain data that is sent to every rank.

    ``document`` already contains the ``overrides`` and the ``fusions`` that were chosen; both are kept for the report.
    """

    document: dict[str, Any]
    wrapper: Wrapper
    overrides: tuple[str, ...] = ()
    fusions: tuple[str, ...] = ()
    distributed_optimizer: bool = False
    sharding_strategy: ShardingStrategy | None = None
    """What Megatron-FSDP shards; None for its default."""
    dp: int | None = None
    training: TrainOptions | None = None
    modelopt_checkpoint: Path | None = None
    weights: Path | None = None
    """A folder to load the initial weights from (``bridge.dist.loaders``); None draws them."""
    checkpoint: Path | None = None
    """A Megatron checkpoint to go on from."""
    save: Path | None = None
    """The folder of Megatron checkpoints to save the model to after the last step."""
    replace_saved: bool = False
    """Whether to replace an iteration in ``save`` that has the same number."""

    def make_builder(self, config: ModelConfig) -> DistributedModelBuilder[MegatronModule, ModelConfig]:
        """Make the builder that a configuration names.

        Raises:
            BuilderContractError: It is not a ``DistributedModelBuilder``.
        """
        return make_builder(config, modelopt_checkpoint=self.modelopt_checkpoint)

    def check(self, config: ModelConfig, world_size: int) -> Layout:
        """Check everything that can be checked before the ranks meet, and return the layout.

        Raises:
            BuilderContractError: The configuration's builder is not a ``DistributedModelBuilder``.
            CheckpointError: There is no checkpoint to load.
            LayoutError: The layout does not fit ``world_size`` ranks.
            PreflightError: Configuration, layout and wrapper conflict in a known way.
            TrainingError: The batch sizes do not fit the layout, or the text does not fit the model.
            BridgeError: Raised by the configuration's own ``finalize``.
        """
        layout = self.finalize(config, world_size)
        builder = self.make_builder(config)
        transformer = builder.transformer_config
        options = self.make_options(transformer)
        setup = Setup(
            transformer=transformer, layout=layout, options=options, model=config, environment=inspect_process()
        )
        check(setup, (*RULES, *builder.rules))
        if self.checkpoint is not None:
            find_iteration(self.checkpoint)
        if self.training is not None:
            check_training(self.wrapper, config, transformer, draws_weights=self.weights is None)
            self.training.check(transformer, layout)
            read_text(self.training, config)
        return layout

    def finalize(self, config: ModelConfig, world_size: int) -> Layout:
        """Finalize a configuration for the device of this process and return its layout, without the other checks.

        Raises:
            BuilderContractError: The configuration's builder is not a ``DistributedModelBuilder``.
            LayoutError: The layout does not fit ``world_size`` ranks.
            BridgeError: Raised by the configuration's own ``finalize``.
        """
        finalize = getattr(config, "finalize", None)
        if finalize is not None:
            finalize()
        transformer = self.make_builder(config).transformer_config
        disable_cuda_graphs(transformer)
        return Layout.of(transformer, world_size, dp=self.dp)

    def find_embedding_ranks(self, config: ModelConfig) -> list[int] | None:
        """Return the pipeline ranks that hold the word embedding or a copy; None for the first and the last."""
        tied = getattr(config, "share_embeddings_and_output_weights", False)
        return find_embedding_ranks(self.make_builder(config).transformer_config, tied=tied)

    def make_options(self, config: TransformerConfig) -> BuildOptions:
        """Return the default build options of the wrapper."""
        if self.wrapper is Wrapper.NONE:
            return BuildOptions(wrap_with_ddp=False)
        ddp = make_default_ddp_options(
            self.wrapper,
            config,
            distributed_optimizer=self.distributed_optimizer,
            sharding_strategy=self.sharding_strategy,
            on_gpu=torch.cuda.is_available(),
        )
        return BuildOptions(
            ddp_config=DistributedDataParallelConfig(**ddp),
            use_megatron_fsdp=self.wrapper is Wrapper.MEGATRON_FSDP,
            use_torch_fsdp2=self.wrapper is Wrapper.TORCH_FSDP2,
        )


def make_builder(
    config: ModelConfig, *, modelopt_checkpoint: Path | None = None
) -> DistributedModelBuilder[MegatronModule, ModelConfig]:
    """Make the builder that a configuration names.

    Args:
        config: The model configuration.
        modelopt_checkpoint: A checkpoint to restore a ModelOpt state and weights from.

    Raises:
        BuilderContractError: It is not a ``DistributedModelBuilder``, or it cannot restore a ModelOpt state.
    """
    builder_cls = config.get_builder_cls()
    arguments = {} if modelopt_checkpoint is None else {"modelopt_checkpoint": modelopt_checkpoint}
    if not arguments.keys() <= inspect.signature(builder_cls).parameters.keys():
        raise BuilderContractError(
            f"{builder_cls.__name__} cannot restore a ModelOpt state: leave out the ModelOpt checkpoint"
        )
    builder = builder_cls(config, **arguments)
    if not isinstance(builder, DistributedModelBuilder):
        raise BuilderContractError(
            f"{type(builder).__name__} is not a DistributedModelBuilder: "
            "derive it from bridge.dist.DistributedModelBuilder"
        )
    return builder


def read_text(options: TrainOptions, config: ModelConfig) -> Text:
    """Read the text to train on as tokens of the model.

    Raises:
        TrainingError: The text cannot be read, or the configuration has no vocabulary or too small a one.
    """
    vocab = get_vocab_size(config)
    if vocab is None:
        raise TrainingError(f"training needs a vocab_size, but {type(config).__name__} has none: add the field")
    longest: int | None = getattr(config, "seq_length", None)
    if longest is not None and options.seq_length > longest:
        raise TrainingError(
            f"samples of {options.seq_length} tokens are longer than the model's seq_length = {longest}: "
            "use shorter samples, or raise seq_length"
        )
    return Text.read(options.text, vocab_size=vocab, tokenizer=options.tokenizer)


def get_vocab_size(config: ModelConfig) -> int | None:
    """Return the unpadded vocabulary size of a configuration; None if it has none."""
    size: int | None = getattr(config, "vocab_size", None)
    return size
