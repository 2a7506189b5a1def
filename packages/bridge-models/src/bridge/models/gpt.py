"""GPT: its configuration, and the builder that makes Megatron-Core's GPTModel from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank

from bridge.dist.checks.preflight import Rule
from bridge.dist.layout import says_how_to_split
from bridge.models.common.config import LanguageModelConfig
from bridge.models.common.stages import ends, virtual_stages
from bridge.models.errors import ModelConfigError
from bridge.models.gpt.layers import layer_spec, mtp_block_spec
from bridge.models.gpt.rules import GPT_RULES, prediction_problem
from bridge.models.modelopt import ModelOptBuilder


@dataclass(kw_only=True)
class GPTModelConfig(LanguageModelConfig):
    """A GPT: a ``TransformerConfig`` and what surrounds it, embeddings and output layer.

    Every field of ``transformer`` is read and written as if it stood here too: ``config.hidden_size = 64`` sets
    ``config.transformer.hidden_size``. A field that both could hold (``rotary_base`` and ``rotary_percent``, with an
    ``MLATransformerConfig``) belongs to ``transformer``.
    """

    builder: ClassVar[str] = "bridge.models.gpt.GPTModelBuilder"

    transformer_layer_spec: ModuleSpec | Callable[[GPTModelConfig], ModuleSpec] | None = None
    """The layers: a spec; a function of this configuration that returns one, and may take ``vp_stage`` by name; None
    for the default choice."""

    position_embedding_type: Literal["learned_absolute", "rope", "mrope", "yarn", "none"] = "learned_absolute"
    """How positions enter the model."""

    rotary_base: int = 10000
    """Base of the rotary frequencies."""

    rope_scaling: bool = False
    """Scale rotary frequencies as Llama 3.1 does."""

    rope_scaling_factor: float = 8.0
    """Factor of ``rope_scaling``."""

    scatter_embedding_sequence_parallel: bool = True
    """With sequence parallelism, split the embedding's output along the sequence."""

    tp_comm_overlap_cfg: str | dict[str, Any] | None = None
    """Settings of ``tp_comm_overlap``: a file, or its content."""

    use_arbitrary_attention_mask: bool | None = None
    """With a ModelOpt state: accept any attention mask. None: unless there is context parallelism."""

    def validate(self) -> None:
        """Check what can be checked without process groups; nothing is changed.

        Raises:
            ModelConfigError: A field lacks a value or contradicts another one.
        """
        super().validate()
        _check_positions(self)
        _check_pipeline_split(self.transformer)
        _check_multi_token_prediction(self)


def _check_positions(config: GPTModelConfig) -> None:
    positions, transformer = config.position_embedding_type, config.transformer
    if positions == "mrope" and transformer.mrope_section is None:
        raise ModelConfigError("position_embedding_type mrope needs transformer.mrope_section: set it")
    # GPTModel of megatron-core 0.19.2 reads these from the transformer, whose class there does not declare them.
    if positions == "yarn" and not hasattr(transformer, "yarn_rotary_scaling_factor"):
        raise ModelConfigError(
            f"position_embedding_type yarn needs the fields yarn_*, which {type(transformer).__name__} does not have: "
            "make it a bridge.models.transformer.YarnTransformerConfig, or set another position_embedding_type"
        )


def _check_pipeline_split(transformer: TransformerConfig) -> None:
    if says_how_to_split(transformer):
        return
    pp = transformer.pipeline_model_parallel_size
    vp = virtual_stages(transformer)
    if transformer.num_layers % (pp * vp):
        raise ModelConfigError(
            f"transformer.num_layers {transformer.num_layers} does not divide into {pp * vp} equal chunks, "
            f"pipeline_model_parallel_size {pp} x virtual_pipeline_model_parallel_size {vp}: "
            "change one of the three, or give a pipeline_model_parallel_layout"
        )


def _check_multi_token_prediction(config: GPTModelConfig) -> None:
    if not config.transformer.mtp_num_layers:
        return
    transformer = config.transformer
    if (problem := prediction_problem(config, transformer.pipeline_model_parallel_size)) is not None:
        raise ModelConfigError(problem)
    if transformer.experimental_attention_variant is not None:
        raise ModelConfigError(
            f"transformer.mtp_num_layers {transformer.mtp_num_layers} does not go together with "
            f"experimental_attention_variant {transformer.experimental_attention_variant}: set one of them to null"
        )


class GPTModelBuilder(ModelOptBuilder[GPTModel, GPTModelConfig]):
    """Builds ``GPTModel`` from a ``GPTModelConfig``.

    Example:
        >>> transformer = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
        >>> builder = GPTModelBuilder(GPTModelConfig(transformer=transformer, vocab_size=256))
        >>> model = builder.build_model(pg_collection)  # one stage, as it is
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
            pre_process: Whether the stage holds the embedding; None lets the stage's place in the pipeline decide.
            post_process: Whether the stage holds the output layer; None as above.
            vp_stage: Index of the virtual pipeline stage, None without a virtual pipeline.

        Raises:
            ModelConfigError: The configuration does not describe a model, or ``vp_stage`` does not fit it.
            UnsupportedError: The layers at hand cannot build what the configuration asks for.
            LayerSpecError: ``transformer_layer_spec`` is not, or does not return, a layer spec.
        """
        config = self._restorable_config(pg_collection, vp_stage)
        config.validate()
        pre_process, post_process = ends(
            config.transformer,
            pg_collection.pp,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        pp_rank = get_pg_rank(pg_collection.pp)
        spec = layer_spec(config, vp_stage=vp_stage, pp_rank=pp_rank)
        # GPTModel takes the specs of whole blocks too, but megatron-core 0.19.2 types them as ModuleSpec only.
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
