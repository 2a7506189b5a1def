"""Model families of megatron.training and Megatron Bridge: names, fields and defaults that differ from Bridge's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bridge.config.foreign.names import GPT, LAYERS, MAMBA, T5

BRIDGE = "megatron.bridge.models"


@dataclass(frozen=True)
class Family:
    """A model family: its names in Bridge and in the other systems, and the differences between them."""

    config: str
    """Bridge's configuration class."""

    builder: str
    """Bridge's builder."""

    provider: str
    """Megatron Bridge's base provider of the family."""

    provider_modules: tuple[str, ...]
    """Modules whose providers only add fields and change defaults, without code."""

    defaults: Mapping[str, Any]
    """Defaults of the base provider that differ from Bridge's."""

    megatron_configs: tuple[str, ...] = ()
    """Configuration classes that embed a transformer. Bridge writes the first one."""

    megatron_builder: str = ""
    """The builder that Bridge writes."""

    aliases: Mapping[str, str] = field(default_factory=dict)
    """Megatron's classes and functions, and their equivalents in Bridge."""

    renamed_fields: Mapping[str, str] = field(default_factory=dict)
    """Megatron's fields that have another name in Bridge."""

    no_effect: frozenset[str] = frozenset()
    """Megatron's fields that do not affect the model, or repeat other fields."""

    disabled_when_zero: frozenset[str] = frozenset()
    """Megatron's fields without an equivalent in Bridge that are disabled by the value 0."""

    bridge_only_fields: dict[str, Any] = field(default_factory=dict)
    """Fields that only Bridge's configuration has, and the values that match Megatron's model."""

    @property
    def layers(self) -> str:
        """The field with the layer spec."""
        return "hybrid_stack_spec" if self.config == MAMBA else "transformer_layer_spec"


_GPT_MODULES = (
    "megatron.training.models.gpt",
    "megatron.bridge.compat.mcore_gpt",
    f"{BRIDGE}.gpt.gpt_builder",
    f"{BRIDGE}.gpt.mcore_gpt_compat",
)
GPT_FAMILY = Family(
    config=GPT,
    builder="bridge.models.gpt.GPTModelBuilder",
    provider=f"{BRIDGE}.gpt_provider.GPTModelProvider",
    provider_modules=(
        f"{BRIDGE}.gpt_provider",
        f"{BRIDGE}.llama.llama_provider",
        f"{BRIDGE}.qwen.qwen_provider",
        f"{BRIDGE}.mistral.mistral_provider",
        f"{BRIDGE}.deepseek.deepseek_provider",
        f"{BRIDGE}.mla_provider",
    ),
    defaults={
        "share_embeddings_and_output_weights": True,
        "attention_softmax_in_fp32": False,
        "deallocate_pipeline_outputs": True,
        "cross_entropy_loss_fusion": True,
    },
    megatron_configs=(
        *(f"{module}.GPTModelConfig" for module in _GPT_MODULES),
        f"{BRIDGE}.gpt.model_config.BridgeGPTModelConfig",
    ),
    megatron_builder=f"{_GPT_MODULES[0]}.GPTModelBuilder",
    aliases={
        **{f"{module}.GPTModelBuilder": "bridge.models.gpt.GPTModelBuilder" for module in _GPT_MODULES},
        **{f"{module}.default_layer_spec": LAYERS[GPT] for module in (*_GPT_MODULES, f"{BRIDGE}.gpt_provider")},
    },
    no_effect=frozenset(["max_position_embeddings", "mtp_enabled", "async_tensor_model_parallel_allreduce"]),
)

_HYBRID_CONFIGS = (
    "megatron.training.models.hybrid.HybridModelConfig",
    f"{BRIDGE}.hybrid.hybrid_builder.HybridModelConfig",
    f"{BRIDGE}.mamba.mamba_builder.MambaModelConfig",
    f"{BRIDGE}.nemotronh.model_config.NemotronHModelConfig",
)
_HYBRID_BUILDERS = (
    "megatron.training.models.hybrid.HybridModelBuilder",
    f"{BRIDGE}.hybrid.HybridModelBuilder",
    f"{BRIDGE}.hybrid.hybrid_builder.HybridModelBuilder",
    f"{BRIDGE}.mamba.MambaModelBuilder",
    f"{BRIDGE}.mamba.mamba_builder.MambaModelBuilder",
)
_HYBRID_LAYERS = (
    *(
        f"{BRIDGE}.hybrid.{module}.{name}"
        for module in ("hybrid_provider", "hybrid_builder")
        for name in ("get_default_hybrid_stack_spec", "transformer_engine_hybrid_stack_spec")
    ),
    *(
        f"{BRIDGE}.mamba.{module}.{name}"
        for module in ("mamba_provider", "mamba_builder")
        for name in ("get_default_mamba_stack_spec", "transformer_engine_mamba_stack_spec")
    ),
)
HYBRID_FAMILY = Family(
    config=MAMBA,
    builder="bridge.models.mamba.MambaModelBuilder",
    provider=f"{BRIDGE}.hybrid.hybrid_provider.HybridModelProvider",
    provider_modules=(
        f"{BRIDGE}.hybrid.hybrid_provider",
        f"{BRIDGE}.mamba.mamba_provider",
        f"{BRIDGE}.mamba.nemotron_h_provider",
        f"{BRIDGE}.nemotronh.nemotron_h_provider",
    ),
    defaults={
        "params_dtype": "torch.bfloat16",
        "bf16": True,
        "num_attention_heads": 1,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "apply_rope_fusion": True,
        "attention_backend": "flash",
        "deallocate_pipeline_outputs": True,
        "bias_dropout_fusion": True,
        "cross_entropy_loss_fusion": True,
    },
    megatron_configs=_HYBRID_CONFIGS,
    megatron_builder=_HYBRID_BUILDERS[0],
    aliases={
        **dict.fromkeys(_HYBRID_BUILDERS, "bridge.models.mamba.MambaModelBuilder"),
        **dict.fromkeys(_HYBRID_LAYERS, LAYERS[MAMBA]),
    },
    renamed_fields={"hybrid_override_pattern": "hybrid_layer_pattern", "mamba_stack_spec": "hybrid_stack_spec"},
    no_effect=frozenset(["max_position_embeddings"]),
    disabled_when_zero=frozenset(["hybrid_attention_ratio", "hybrid_mlp_ratio"]),
    bridge_only_fields={"scatter_embedding_sequence_parallel": True},
)
T5_FAMILY = Family(
    config=T5,
    builder="bridge.models.t5.T5ModelBuilder",
    provider=f"{BRIDGE}.t5_provider.T5ModelProvider",
    provider_modules=(f"{BRIDGE}.t5_provider",),
    defaults={
        "seq_length": 512,
        "apply_rope_fusion": True,
        "attention_softmax_in_fp32": False,
        "bias_activation_fusion": True,
        "masked_softmax_fusion": True,
        "persist_layer_norm": True,
        "bias_dropout_fusion": True,
        "deallocate_pipeline_outputs": True,
    },
    renamed_fields={"max_position_embeddings": "seq_length"},
    no_effect=frozenset(["seq_length", "seq_length_dec"]),
    disabled_when_zero=frozenset(["encoder_pipeline_model_parallel_size"]),
)
FAMILIES = (GPT_FAMILY, HYBRID_FAMILY, T5_FAMILY)
