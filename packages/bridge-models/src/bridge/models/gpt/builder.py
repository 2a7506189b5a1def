"""The builder of a GPT."""

from __future__ import annotations

from typing import ClassVar, cast

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import get_pg_rank

from bridge.dist.checks.preflight import Rule
from bridge.models.common.stages import first_and_last
from bridge.models.gpt.config import GPTModelConfig
from bridge.models.gpt.layers import layer_spec, mtp_block_spec
from bridge.models.gpt.rules import GPT_RULES
from bridge.models.modelopt.builder import ModelOptBuilder


class GPTModelBuilder(ModelOptBuilder[GPTModel, GPTModelConfig]):
    """Builds ``GPTModel`` from a ``GPTModelConfig``.

    Example:
        >>> transformer = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
        >>> builder = GPTModelBuilder(GPTModelConfig(transformer=transformer, vocab_size=256))
        >>> model = builder.build_model(pg_collection)  # one pipeline stage, not wrapped
        >>> stages = builder.build_distributed_models(pg_collection, ddp_config)  # all stages of this rank, wrapped
    """

    rules: ClassVar[tuple[Rule, ...]] = GPT_RULES

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Build one pipeline stage, neither wrapped nor moved to a device.

        Args:
            pg_collection: The process groups of this rank.
            pre_process: Whether the stage holds the embedding; None to derive it from the pipeline position.
            post_process: Whether the stage holds the output layer; None as above.
            vp_stage: Index of the virtual pipeline stage, None without a virtual pipeline.

        Raises:
            ModelConfigError: The configuration is invalid, or ``vp_stage`` contradicts it.
            UnsupportedError: The available layers do not support the configuration.
            LayerSpecError: ``transformer_layer_spec`` is not a layer spec and does not return one.
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
        pp_rank = get_pg_rank(pg_collection.pp)
        spec = layer_spec(config, vp_stage=vp_stage, pp_rank=pp_rank)
        # GPTModel also accepts block specs, but megatron-core 0.19.2 annotates only ModuleSpec.
        return GPTModel(
            config=config.transformer,
            transformer_layer_spec=cast(ModuleSpec, spec),
            mtp_block_spec=cast(ModuleSpec | None, mtp_block_spec(config, spec, vp_stage=vp_stage, pp_rank=pp_rank)),
            vocab_size=config.padded_vocab_size,
            max_sequence_length=config.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
            parallel_output=config.parallel_output,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            rope_scaling=config.rope_scaling,
            rope_scaling_factor=config.rope_scaling_factor,
            scatter_embedding_sequence_parallel=config.scatter_embedding_sequence_parallel,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
