"""Ranges of numeric config fields that hold for every layout, precision and combination of other fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

TRANSFORMER = "megatron.core.transformer.transformer_config.TransformerConfig"
LATENT = "megatron.core.transformer.transformer_config.MLATransformerConfig"
_YARN = "bridge.models.transformer.YarnTransformerConfig"
LANGUAGE = "bridge.models.common.config.LanguageModelConfig"
_GPT = "bridge.models.gpt.GPTModelConfig"
MAMBA = "bridge.models.mamba.MambaModelConfig"
T5 = "bridge.models.t5.T5ModelConfig"

_NUMBERS = frozenset({int, float})


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers from ``minimum`` to ``maximum``. Both are included, unless ``exclusive`` leaves out ``minimum``."""

    minimum: float
    maximum: float | None = None
    exclusive: bool = False
    """Whether values must be above ``minimum``."""

    def find_problem(self, value: object) -> str | None:
        """Return the message about a value outside this range; None if it is inside or not an int or float.

        Values of the wrong type are reported by the type check.
        """
        if type(value) not in _NUMBERS or value in self:
            return None
        return f"must be {self}, got {value}"

    def __contains__(self, value: Any) -> bool:
        if value < self.minimum or (self.exclusive and value == self.minimum):
            return False
        return self.maximum is None or value <= self.maximum

    def __str__(self) -> str:
        at_least = "above" if self.exclusive else "at least"
        if self.maximum is None:
            return f"{at_least} {self.minimum}"
        if self.exclusive:
            return f"above {self.minimum} and at most {self.maximum}"
        return f"between {self.minimum} and {self.maximum}"


COUNT = Range(minimum=1)
"""Sizes and counts of parts that every model needs."""

NOT_NEGATIVE = Range(minimum=0)
POSITIVE = Range(minimum=0, exclusive=True)
SHARE = Range(minimum=0, maximum=1)

_TRANSFORMER_COUNTS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "kv_channels",
    "num_moe_experts",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "tensor_parallel_num_weight_shards",
    "expert_tensor_parallel_num_weight_shards",
    "gtp_weight_remat_size",
    "expert_gtp_weight_remat_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "microbatch_group_size_per_vp_stage",
    "recompute_num_layers",
    "mlp_chunks_for_prefill",
    "mlp_chunks_for_training",
)

FIELD_RANGES: Mapping[str, Mapping[str, Range]] = {
    TRANSFORMER: {
        **dict.fromkeys(_TRANSFORMER_COUNTS, COUNT),
        "mtp_num_layers": NOT_NEGATIVE,
        "no_rope_freq": NOT_NEGATIVE,
        "hidden_dropout": SHARE,
        "attention_dropout": SHARE,
        "layernorm_epsilon": NOT_NEGATIVE,
        "init_method_std": NOT_NEGATIVE,
        "embedding_init_method_std": NOT_NEGATIVE,
    },
    LATENT: {
        "original_max_position_embeddings": COUNT,
        "rotary_base": POSITIVE,
        "rotary_percent": Range(minimum=0, maximum=1, exclusive=True),
        "rotary_scaling_factor": POSITIVE,
    },
    _YARN: {"yarn_rotary_scaling_factor": POSITIVE, "yarn_original_max_position_embeddings": COUNT},
    LANGUAGE: {
        **dict.fromkeys(("vocab_size", "make_vocab_size_divisible_by", "seq_length"), COUNT),
        "rotary_percent": SHARE,
        "seq_len_interpolation_factor": POSITIVE,
    },
    _GPT: {"rotary_base": POSITIVE, "rope_scaling_factor": POSITIVE},
    MAMBA: {"rotary_base": POSITIVE},
    T5: {
        **dict.fromkeys(
            ("encoder_num_layers", "encoder_ffn_hidden_size", "encoder_num_attention_heads", "encoder_kv_channels"),
            COUNT,
        ),
        "relative_attention_num_buckets": Range(minimum=4),
        "relative_attention_max_distance": COUNT,
    },
}
"""Ranges by class name and field. Fields that only some models use (experts, Mamba) are checked in ``arithmetic``."""


@cache
def get_ranges(bases: tuple[str, ...]) -> dict[str, Range]:
    """Return the ranges of the fields of a class, by field. A derived class overrides its base classes.

    Args:
        bases: The dotted names of the class and of its base classes, itself first.
    """
    found: dict[str, Range] = {}
    for base in reversed(bases):
        found |= FIELD_RANGES.get(base, {})
    return found
