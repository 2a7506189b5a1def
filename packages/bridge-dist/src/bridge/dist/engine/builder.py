"""Base class of builders whose stages are single modules: they implement ``build_model``, the engine does the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.module import Float16Module

from bridge.builders import BuildConfigT, MixedPrecisionWrapper, ModelBuilder, ModelT, compose_hooks
from bridge.dist.checks.preflight import Rule
from bridge.dist.engine.build import build_distributed
from bridge.dist.engine.forward import decoder_logits_step, next_token_step
from bridge.dist.engine.options import BuildOptions
from bridge.dist.errors import BuilderContractError


class DistributedModelBuilder(ModelBuilder[ModelT, BuildConfigT]):
    """A builder of single-module stages: a subclass only implements ``build_model``.

    The configuration must embed a ``TransformerConfig`` as ``transformer``; a subclass whose configuration keeps it
    elsewhere overrides ``transformer_config``.
    """

    rules: ClassVar[Sequence[Rule]] = ()
    """Pre-flight rules of this family, in addition to the rules for all: see ``bridge.dist.checks.preflight``."""

    @property
    def transformer_config(self) -> TransformerConfig:
        """The Megatron configuration of the model: precision, devices and the virtual pipeline."""
        transformer = getattr(self._model_config, "transformer", None)
        if not isinstance(transformer, TransformerConfig):
            raise BuilderContractError(
                f"{type(self._model_config).__name__} has no TransformerConfig named 'transformer': "
                f"add the field, or override {type(self).__name__}.transformer_config"
            )
        return transformer

    def forward_step(
        self, stage: MegatronModule, tokens: torch.Tensor, pg_collection: ProcessGroupCollection
    ) -> torch.Tensor:
        """Run a stage on a microbatch of text, as `bridge build --steps` and `bridge verify` train.

        Override it for models that are not decoders.

        Args:
            stage: One of those that ``build_distributed_models`` returned.
            tokens: [microbatch, sequence + 1], the same on all ranks that share the microbatch.
            pg_collection: The process groups of this rank.

        Returns:
            On the last stage a loss for each token, shape [microbatch, this context-parallel rank's part of the
            sequence]; on other stages the input of the next one.
        """
        return next_token_step(stage, tokens, pg_collection)

    def logits_step(
        self, stage: MegatronModule, tokens: torch.Tensor, pg_collection: ProcessGroupCollection
    ) -> torch.Tensor:
        """Run a stage on a microbatch of text and compute logits, which `bridge verify` compares with transformers.

        Override it for models that are not decoders.

        Args:
            stage: One of those that ``build_distributed_models`` returned.
            tokens: [microbatch, sequence], the same on all ranks that share the microbatch.
            pg_collection: The process groups of this rank.

        Returns:
            On the last stage the logits of this rank, [microbatch, its part of the sequence, its part of the
            vocabulary]; on other stages the input of the next one.
        """
        return decoder_logits_step(stage, tokens, pg_collection)

    def check_restore(self) -> None:
        """Check before the build that stages can be restored.

        Builders that can restore a ModelOpt state override this and ``restore``.

        Raises:
            BuilderContractError: The configuration requests a restore that this builder does not support.
        """
        if self._model_config.restore_modelopt_state:
            raise BuilderContractError(
                f"restore_modelopt_state is true, but {type(self).__name__} cannot restore a ModelOpt state: "
                "set it to false, or derive the builder from bridge.models.modelopt.ModelOptBuilder"
            )

    def restore(self, stages: list[MegatronModule], pg_collection: ProcessGroupCollection) -> list[MegatronModule]:
        """Restore the stages of this rank after they are built and before any hook. The default does nothing."""
        return stages

    def build_distributed_models(
        self,
        pg_collection: ProcessGroupCollection,
        ddp_config: DistributedDataParallelConfig | None = None,
        overlap_param_gather_with_optimizer_step: bool = False,
        use_megatron_fsdp: bool = False,
        use_torch_fsdp2: bool = False,
        wrap_with_ddp: bool = True,
        data_parallel_random_init: bool = True,
        mixed_precision_wrapper: MixedPrecisionWrapper | None = Float16Module,
        model_type: ModelType = ModelType.encoder_or_decoder,
        *,
        use_layer_wise_distributed_optimizer: bool = False,
        use_layer_wise_param_layout: bool = True,
    ) -> list[ModelT]:
        """Build all stages of this rank and wrap them for training; see ``ModelBuilder``.

        The order: stages, ``restore``, pre-wrap hooks, tensor-parallel attributes, device, mixed precision,
        data-parallel wrapper, broadcast, post-wrap hooks. Neither ``ddp_config`` nor the configuration nor its hooks
        are changed.

        Two keyword-only arguments are added: ``use_layer_wise_distributed_optimizer`` for an optimizer (Muon) that
        updates each parameter as a whole on one rank, and ``use_layer_wise_param_layout`` to lay out DDP's buffers so
        that gradients are reduced to that rank only.

        Raises:
            AgreementError: The ranks would build different models.
            OptionsError: The options contradict each other.
            PreflightError: The configuration does not fit the process groups or the wrapper.
            HookError: A hook returned anything but the list of stages; see ``compose_hooks``.
            CopyError: A pre-wrap hook left copies of a parameter different on ranks that hold it.
            BridgeError: Raised by ``check_restore`` or ``restore``.
        """
        self.check_restore()
        options = BuildOptions(
            ddp_config=ddp_config,
            overlap_param_gather_with_optimizer_step=overlap_param_gather_with_optimizer_step,
            use_megatron_fsdp=use_megatron_fsdp,
            use_torch_fsdp2=use_torch_fsdp2,
            wrap_with_ddp=wrap_with_ddp,
            data_parallel_random_init=data_parallel_random_init,
            mixed_precision_wrapper=mixed_precision_wrapper,
            model_type=model_type,
            use_layer_wise_distributed_optimizer=use_layer_wise_distributed_optimizer,
            use_layer_wise_param_layout=use_layer_wise_param_layout,
        )
        hooks = compose_hooks(self._model_config.pre_wrap_hooks)
        stages = build_distributed(
            self.build_model,
            self.transformer_config,
            pg_collection,
            options=options,
            pre_wrap_hook=lambda stages: hooks(self.restore(stages, pg_collection)),
            post_wrap_hook=compose_hooks(self._model_config.post_wrap_hooks),
            model=self._model_config,
            rules=self.rules,
        )
        # The wrappers forward to the model they hold; Megatron Bridge's signature types them as that model.
        return cast(list[ModelT], stages)
