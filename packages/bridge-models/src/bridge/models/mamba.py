"""Mamba and hybrid models: their configuration, and the builder that makes Megatron-Core's HybridModel from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.config.schema.versions import Moved, Removed, Schema
from bridge.dist.checks.preflight import Rule
from bridge.models.common.config import LanguageModelConfig
from bridge.models.common.stages import ends, virtual_stages
from bridge.models.errors import ModelConfigError
from bridge.models.mamba.layers import stack_spec
from bridge.models.mamba.rules import MAMBA_RULES, layer_pattern, pattern_of_stages
from bridge.models.modelopt import ModelOptBuilder

_USE_PATTERN = (
    "the ratio went: write the layers out in hybrid_layer_pattern, as "
    "megatron.core.models.hybrid.hybrid_layer_allocation.pattern_from_ratios gives them"
)


@dataclass(kw_only=True)
class MambaModelConfig(LanguageModelConfig):
    """A Mamba or hybrid model: a ``TransformerConfig``, the kinds of its layers, embeddings and output layer.

    Every field of ``transformer`` is read and written as if it stood here too. The sizes of Mamba layers are its
    fields ``mamba_*``.
    """

    builder: ClassVar[str] = "bridge.models.mamba.MambaModelBuilder"
    schema: ClassVar[Schema] = Schema(
        version=2,
        changes=(
            Moved(2, "hybrid_override_pattern", "hybrid_layer_pattern"),
            Moved(2, "mamba_stack_spec", "hybrid_stack_spec"),
            Removed(2, "hybrid_attention_ratio", (0, 0.0, None), _USE_PATTERN),
            Removed(2, "hybrid_mlp_ratio", (0, 0.0, None), _USE_PATTERN),
        ),
    )

    transformer: TransformerConfig
    """The sizes of the layers, and how they are split over ranks."""

    hybrid_layer_pattern: str | None = None
    """A symbol for each layer: ``M`` Mamba, ``*`` attention, ``-`` MLP, ``E`` experts; ``|`` between pipeline stages,
    of virtual ones too; without any, stages are equal. None for Mamba layers alone."""

    hybrid_stack_spec: ModuleSpec | Callable[[MambaModelConfig], ModuleSpec] | Callable[[], ModuleSpec] | None = None
    """The layers of each kind: a spec; a function of this configuration, or of nothing, that returns one; None for the
    default choice."""

    seq_length: int = 8192
    """Longest sequence, in tokens; with learned positions, the number of them."""

    position_embedding_type: Literal["learned_absolute", "rope", "yarn", "none"] = "none"
    """How positions enter the model, beside the order in which Mamba layers read."""

    rotary_base: int = 10000
    """Base of the rotary frequencies."""

    scatter_embedding_sequence_parallel: bool = True
    """With sequence parallelism, split the embedding's output along the sequence."""

    def validate(self) -> None:
        """Check what can be checked without process groups; nothing is changed.

        Raises:
            ModelConfigError: A field lacks a value or contradicts another one.
        """
        super().validate()
        _pattern_of_stages(self)
        _check_positions(self)

    @property
    def layer_pattern(self) -> str:
        """The kind of each layer: ``hybrid_layer_pattern``, or Mamba layers alone."""
        return layer_pattern(self)


def _pattern_of_stages(config: MambaModelConfig) -> str:
    """The pattern as Megatron's model takes it."""
    stages = config.transformer.pipeline_model_parallel_size * virtual_stages(config.transformer)
    return pattern_of_stages(config, stages)


def _check_positions(config: MambaModelConfig) -> None:
    # HybridModel of megatron-core 0.19.2 reads these from the transformer, whose class there does not declare them.
    if config.position_embedding_type == "yarn" and not hasattr(config.transformer, "yarn_rotary_scaling_factor"):
        raise ModelConfigError(
            f"position_embedding_type yarn needs the fields yarn_*, which {type(config.transformer).__name__} does not "
            "have: make it a bridge.models.transformer.YarnTransformerConfig, or set another position_embedding_type"
        )


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
            pre_process: Whether the stage holds the embedding; None lets the stage's place in the pipeline decide.
            post_process: Whether the stage holds the output layer; None as above.
            vp_stage: Index of the virtual pipeline stage, None without a virtual pipeline.

        Raises:
            ModelConfigError: The configuration does not describe a model, or ``vp_stage`` does not fit it.
            UnsupportedError: The layers at hand cannot build what the configuration asks for.
            LayerSpecError: ``hybrid_stack_spec`` is not, or does not return, a spec.
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
        return HybridModel(
            config=config.transformer,
            hybrid_stack_spec=stack_spec(config),
            vocab_size=config.padded_vocab_size,
            max_sequence_length=config.seq_length,
            hybrid_layer_pattern=_pattern_of_stages(config),
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
