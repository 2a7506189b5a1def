"""The configuration of a Mamba or hybrid model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.config.schema.versions import Moved, Removed, Schema
from bridge.models.common.config import LanguageModelConfig
from bridge.models.common.stages import count_pipeline_stages
from bridge.models.common.yarn import check_yarn
from bridge.models.mamba.rules import layer_pattern, split_model_pattern

_USE_PATTERN = (
    "layer ratios were removed: set hybrid_layer_pattern instead, for example to the result of "
    "megatron.core.models.hybrid.hybrid_layer_allocation.pattern_from_ratios"
)


@dataclass(kw_only=True)
class MambaModelConfig(LanguageModelConfig):
    """Configuration of a Mamba or hybrid model: ``TransformerConfig``, layer pattern, embeddings and output layer.

    Fields of ``transformer`` can be read and written here directly. Its ``mamba_*`` fields hold the sizes of Mamba
    layers.
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
    """Sizes of the layers and their parallelism."""

    hybrid_layer_pattern: str | None = None
    """One symbol per layer: ``M`` Mamba, ``*`` attention, ``-`` MLP, ``E`` experts. ``|`` separates pipeline stages,
    including virtual ones; without it, stages are equal. None: Mamba layers only."""

    hybrid_stack_spec: ModuleSpec | Callable[[MambaModelConfig], ModuleSpec] | Callable[[], ModuleSpec] | None = None
    """The layers of each kind: a spec, a function that takes this configuration or no argument and returns one, or None
    for the default."""

    seq_length: int = 8192
    """Maximum sequence length in tokens; with learned positions, the number of positions."""

    position_embedding_type: Literal["learned_absolute", "rope", "yarn", "none"] = "none"
    """Type of position embedding. Mamba layers need none: they read tokens in order."""

    rotary_base: int = 10000
    """Base of the rotary frequencies."""

    scatter_embedding_sequence_parallel: bool = True
    """With sequence parallelism, split the embedding's output along the sequence."""

    def validate(self) -> None:
        """Run the checks that need no process groups, without changing anything.

        Raises:
            ModelConfigError: A required field is missing, or two fields contradict each other.
        """
        super().validate()
        split_model_pattern(self, count_pipeline_stages(self.transformer))
        check_yarn(self.position_embedding_type, self.transformer)

    @property
    def layer_pattern(self) -> str:
        """The kind of each layer: ``hybrid_layer_pattern``, or all Mamba if it is None."""
        return layer_pattern(self)
