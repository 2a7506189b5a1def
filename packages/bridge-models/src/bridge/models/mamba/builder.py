"""The builder of Mamba and hybrid models."""

from __future__ import annotations

from typing import ClassVar

from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection

from bridge.dist.checks.preflight import Rule
from bridge.models.common.stages import count_pipeline_stages, first_and_last
from bridge.models.mamba.config import MambaModelConfig
from bridge.models.mamba.layers import stack_spec
from bridge.models.mamba.rules import MAMBA_RULES, split_model_pattern
from bridge.models.modelopt.builder import ModelOptBuilder


class MambaModelBuilder(ModelOptBuilder[HybridModel, MambaModelConfig]):
    """Builds ``HybridModel`` from a ``MambaModelConfig``."""

    rules: ClassVar[tuple[Rule, ...]] = MAMBA_RULES

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> HybridModel:
        """Build one pipeline stage, neither wrapped nor moved to a device.

        Args:
            pg_collection: The process groups of this rank.
            pre_process: Whether the stage holds the embedding; None to derive it from the pipeline position.
            post_process: Whether the stage holds the output layer; None as above.
            vp_stage: Index of the virtual pipeline stage, None without a virtual pipeline.

        Raises:
            ModelConfigError: The configuration is invalid, or ``vp_stage`` contradicts it.
            UnsupportedError: The available layers do not support the configuration.
            LayerSpecError: ``hybrid_stack_spec`` is not a spec and does not return one.
        """
        config = self._config_to_build(pg_collection, vp_stage)
        config.validate()
        pre_process, post_process = first_and_last(
            config.transformer,
            pg_collection.pp,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        return HybridModel(
            config=config.transformer,
            hybrid_stack_spec=stack_spec(config),
            vocab_size=config.padded_vocab_size,
            max_sequence_length=config.seq_length,
            hybrid_layer_pattern=split_model_pattern(config, count_pipeline_stages(config.transformer)),
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
            parallel_output=config.parallel_output,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            scatter_embedding_sequence_parallel=config.scatter_embedding_sequence_parallel,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
