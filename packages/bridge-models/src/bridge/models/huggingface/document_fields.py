"""Convert documents to fields with defaults, and fields to documents without redundant defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from typing import Any

from bridge.config.canonical import canonicalize
from bridge.config.schema.table import get_shipped
from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.targets import GENERATION, TRANSFORMER

ALWAYS_WRITTEN = frozenset(
    (
        "vocab_size",
        "seq_length",
        "position_embedding_type",
        "rotary_base",
        "rope_scaling_factor",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
        "share_embeddings_and_output_weights",
        *(
            f"transformer.{name}"
            for name in (
                "normalization",
                "layernorm_epsilon",
                "add_bias_linear",
                "gated_linear_unit",
                "activation_func",
                "hidden_dropout",
                "attention_dropout",
                "init_method_std",
                "kv_lora_rank",
                "qk_head_dim",
                "qk_pos_emb_head_dim",
                "v_head_dim",
                "rope_type",
                "original_max_position_embeddings",
                "mscale",
                "mamba_state_dim",
                "mamba_head_dim",
                "mamba_num_groups",
                "moe_router_topk",
                "yarn_original_max_position_embeddings",
                "yarn_beta_fast",
                "yarn_beta_slow",
            )
        ),
    )
)
"""Fields that readers expect to see: they are written even if they have their default."""

AFFECTS_COMPUTATION = frozenset(
    (
        "transformer_layer_spec",
        "hybrid_stack_spec",
        "encoder_layer_spec",
        "decoder_layer_spec",
        "rope_scaling",
        "rope_scaling_factor",
        "rotary_percent",
        "seq_len_interpolation_factor",
        *(
            f"transformer.{name}"
            for name in (
                "activation_func",
                "activation_func_clamp_value",
                "add_bias_linear",
                "add_qkv_bias",
                "apply_residual_connection_post_layernorm",
                "attention_output_gate",
                "experimental_attention_variant",
                "gated_linear_unit",
                "glu_linear_offset",
                "heterogeneous_block_specs",
                "layernorm_zero_centered_gamma",
                "linear_attention_freq",
                "moe_apply_probs_on_input",
                "moe_expert_capacity_factor",
                "moe_expert_rank_capacity_factor",
                "moe_latent_size",
                "moe_layer_freq",
                "moe_router_enable_expert_bias",
                "moe_router_force_biased",
                "moe_router_force_load_balancing",
                "moe_router_group_topk",
                "moe_router_num_groups",
                "moe_router_pre_softmax",
                "moe_router_score_function",
                "moe_router_topk_limited_devices",
                "moe_router_topk_scaling_factor",
                "moe_shared_expert_gate",
                "moe_shared_expert_intermediate_size",
                "mrope_section",
                "mtp_num_layers",
                "mtp_use_repeated_layer",
                "multi_latent_attention",
                "no_rope_freq",
                "normalization",
                "num_moe_experts",
                "qk_l2_norm",
                "qk_layernorm",
                "rotary_interleaved",
                "softmax_scale",
                "softmax_type",
                "use_mup",
                "window_size",
            )
        ),
    )
)
"""Fields that change what a model computes or which parameters it has: ``to_hf`` must not drop them."""


def make_document(fields: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Return the fields as a document, without defaults except ``ALWAYS_WRITTEN``."""
    target = get_shipped(architecture.target)
    inner = fields.get("transformer._target_", TRANSFORMER)
    transformer = get_shipped(inner)
    assert target
    assert transformer
    top: dict[str, Any] = {"_target_": architecture.target}
    inside: dict[str, Any] = {} if inner == TRANSFORMER else {"_target_": inner}
    for path, value in fields.items():
        outer, dot, name = path.partition(".")
        if name == "_target_":
            continue
        known = (transformer.fields[name] if dot else target.fields[outer]).default
        is_default = known is not MISSING and known == value and type(known) is type(value)
        if is_default and path not in ALWAYS_WRITTEN:
            continue
        (inside if dot else top)[name or outer] = value
    return top | {"transformer": inside}


def read_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a document by dotted path, with defaults. Generation settings have no defaults added.

    Generation settings of other classes than transformers' are left out.
    """
    whole = canonicalize(data, defaults=True)
    transformer = whole.pop("transformer")
    generation = canonicalize(data).get("generation_config")
    is_supported = isinstance(generation, dict) and generation.get("_target_") == GENERATION
    whole["generation_config"] = generation if is_supported else None
    return whole | {f"transformer.{name}": value for name, value in transformer.items()}


def find_non_defaults(fields: Mapping[str, Any], paths: Iterable[str]) -> Iterable[str]:
    """Yield the paths whose values differ from their defaults."""
    target = get_shipped(str(fields["_target_"]))
    transformer = get_shipped(str(fields["transformer._target_"]))
    assert target
    assert transformer
    for path in paths:
        outer, dot, name = path.partition(".")
        known = (transformer if dot else target).fields.get(name or outer)
        if known is not None and path in fields and fields[path] != known.default:
            yield path
