"""The configuration of a Mamba or hybrid model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.config.schema.versions import Moved, Removed, Schema
from bridge.models.common.config import LanguageModelConfig
from bridge.models.common.stages import pipeline_stages
from bridge.models.common.yarn import check_yarn
from bridge.models.mamba.rules import layer_pattern, pattern_of_stages

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
        pattern_of_stages(self, pipeline_stages(self.transformer))
        check_yarn(self.position_embedding_type, self.transformer)

    @property
    def layer_pattern(self) -> str:
        """The kind of each layer: ``hybrid_layer_pattern``, or Mamba layers alone."""
        return layer_pattern(self)
