"""The configuration of a GPT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.dist.layout import has_custom_split
from bridge.models.common.config import LanguageModelConfig
from bridge.models.common.stages import count_virtual_stages
from bridge.models.common.yarn import check_yarn
from bridge.models.errors import ModelConfigError
from bridge.models.gpt.rules import find_prediction_problem


@dataclass(kw_only=True)
class GPTModelConfig(LanguageModelConfig):
    """Configuration of a GPT: a ``TransformerConfig`` plus the embeddings and the output layer.

    Fields of ``transformer`` can be read and written here directly: ``config.hidden_size = 64`` sets
    ``config.transformer.hidden_size``. Fields that both classes define (``rotary_base`` and ``rotary_percent``, with
    an ``MLATransformerConfig``) belong to ``transformer``.
    """

    builder: ClassVar[str] = "bridge.models.gpt.GPTModelBuilder"

    transformer_layer_spec: ModuleSpec | Callable[[GPTModelConfig], ModuleSpec] | None = None
    """The layers: a spec, a function that takes this configuration (and optionally ``vp_stage``) and returns one, or
    None for the default."""

    position_embedding_type: Literal["learned_absolute", "rope", "mrope", "yarn", "none"] = "learned_absolute"
    """Type of position embedding."""

    rotary_base: int = 10000
    """Base of the rotary frequencies."""

    rope_scaling: bool = False
    """Scale rotary frequencies as Llama 3.1 does."""

    rope_scaling_factor: float = 8.0
    """Factor of ``rope_scaling``."""

    scatter_embedding_sequence_parallel: bool = True
    """With sequence parallelism, split the embedding's output along the sequence."""

    tp_comm_overlap_cfg: str | dict[str, Any] | None = None
    """Settings of ``tp_comm_overlap``: a path, or the content of the file."""

    use_arbitrary_attention_mask: bool | None = None
    """With a ModelOpt state: accept arbitrary attention masks. None: only without context parallelism."""

    def validate(self) -> None:
        """Run the checks that need no process groups, without changing anything.

        Raises:
            ModelConfigError: A required field is missing, or two fields contradict each other.
        """
        super().validate()
        _check_positions(self)
        _check_pipeline_split(self.transformer)
        _check_multi_token_prediction(self)


def _check_positions(config: GPTModelConfig) -> None:
    positions, transformer = config.position_embedding_type, config.transformer
    if positions == "mrope" and transformer.mrope_section is None:
        raise ModelConfigError("position_embedding_type is mrope, which requires transformer.mrope_section: set it")
    check_yarn(positions, transformer)


def _check_pipeline_split(transformer: TransformerConfig) -> None:
    if has_custom_split(transformer):
        return
    pp = transformer.pipeline_model_parallel_size
    vp = count_virtual_stages(transformer)
    if transformer.num_layers % (pp * vp):
        raise ModelConfigError(
            f"transformer.num_layers {transformer.num_layers} is not divisible by {pp * vp} chunks, "
            f"pipeline_model_parallel_size {pp} x virtual_pipeline_model_parallel_size {vp}: "
            "change one of the three, or set pipeline_model_parallel_layout"
        )


def _check_multi_token_prediction(config: GPTModelConfig) -> None:
    if not config.transformer.mtp_num_layers:
        return
    transformer = config.transformer
    if (problem := find_prediction_problem(config, transformer.pipeline_model_parallel_size)) is not None:
        raise ModelConfigError(problem)
    if transformer.experimental_attention_variant is not None:
        raise ModelConfigError(
            f"transformer.mtp_num_layers {transformer.mtp_num_layers} is not supported with "
            f"experimental_attention_variant {transformer.experimental_attention_variant}: set one of them to null"
        )
