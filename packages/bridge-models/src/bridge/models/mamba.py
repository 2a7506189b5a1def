"""Mamba and hybrid models: their configuration, and the builder that makes Megatron-Core's HybridModel from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.config.migrate import Moved, Removed, Schema
from bridge.config.schema import hybrid_pattern
from bridge.dist.preflight import MEGATRON, Rule, Setup, rule
from bridge.models.errors import ModelConfigError
from bridge.models.hybrid_layers import stack_spec
from bridge.models.hybrid_pattern import staged
from bridge.models.language import LanguageModelConfig
from bridge.models.modelopt import ModelOptBuilder
from bridge.models.pipeline import ends, virtual_stages

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
        pattern = self.hybrid_layer_pattern
        return hybrid_pattern.MAMBA * self.transformer.num_layers if pattern is None else pattern


def _pattern_of_stages(config: MambaModelConfig) -> str:
    """The pattern as Megatron's model takes it."""
    transformer, pattern = config.transformer, config.layer_pattern
    uneven = {
        name: getattr(transformer, name)
        for name in (
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "pipeline_model_parallel_layout",
        )
        if getattr(transformer, name) is not None
    }
    if uneven:
        raise ModelConfigError(
            f"transformer.{' and '.join(uneven)} does not split a hybrid model: "
            "put | between the layers in hybrid_layer_pattern where stages shall end"
        )
    return staged(pattern, transformer.pipeline_model_parallel_size * virtual_stages(transformer))


def _check_positions(config: MambaModelConfig) -> None:
    # HybridModel of megatron-core 0.19.2 reads these from the transformer, whose class there does not declare them.
    if config.position_embedding_type == "yarn" and not hasattr(config.transformer, "yarn_rotary_scaling_factor"):
        raise ModelConfigError(
            f"position_embedding_type yarn needs the fields yarn_*, which {type(config.transformer).__name__} does not "
            "have: make it a bridge.models.transformer.YarnTransformerConfig, or set another position_embedding_type"
        )


def mamba_heads(transformer: TransformerConfig) -> int:
    """Return the number of heads of a Mamba layer: the one given, or as many as twice the hidden size holds."""
    return transformer.mamba_num_heads or 2 * transformer.hidden_size // transformer.mamba_head_dim


@rule()
def mamba_heads_divide(setup: Setup) -> Iterator[str]:
    """Each rank of tensor parallelism holds whole heads and groups of a Mamba layer, and context parallelism shares
    them out again.
    """
    assert isinstance(setup.model, MambaModelConfig)
    if hybrid_pattern.MAMBA not in setup.model.layer_pattern:
        return
    tp, cp = setup.layout.tp, setup.layout.cp
    heads, groups = mamba_heads(setup.transformer), setup.transformer.mamba_num_groups
    if heads % (tp * cp):
        yield f"a Mamba layer has {heads} heads, not a multiple of tp x cp = {tp} x {cp}: choose others"
    if groups % tp:
        yield f"mamba_num_groups = {groups} is not a multiple of tp = {tp}: choose a tp that divides it"
    elif (groups // tp) % cp and cp % (groups // tp):
        yield (
            f"mamba_num_groups = {groups} on tp = {tp} is {groups // tp} a rank, neither a multiple nor a divisor of "
            f"cp = {cp}: choose another cp"
        )


@rule(seen=MEGATRON)
def mamba_params_dtype(setup: Setup) -> Iterator[str]:
    """A Mamba layer casts its input to ``params_dtype``, whatever its weights were cast to: an error about mixed types
    in the first forward pass.
    """
    config = setup.transformer
    half = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    if half is not None and config.params_dtype != half:
        yield f"params_dtype is {config.params_dtype}, but Mamba layers compute in {half}: set params_dtype to {half}"


@rule(seen=MEGATRON, not_shown="it needs Transformer Engine")
def mamba_offloading(setup: Setup) -> Iterator[str]:
    """A stack of hybrid layers offloads nothing, without a word of it: Megatron's transformer block does."""
    if setup.transformer.cpu_offloading:
        yield "a hybrid model does not offload whole layers: set cpu_offloading = False"


class MambaModelBuilder(ModelOptBuilder[HybridModel, MambaModelConfig]):
    """Builds ``HybridModel`` from a ``MambaModelConfig``."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *ModelOptBuilder.rules,
        mamba_heads_divide,
        mamba_params_dtype,
        mamba_offloading,
    )

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
