"""Fields of config.json and of documents that are the same to every architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IGNORED = frozenset(
    (
        "model_type",
        "architectures",
        "transformers_version",
        "use_cache",
        # how the classes of transformers behave, not what the model is
        "attn_implementation",
        "_attn_implementation_autoset",
        "auto_map",
        "chunk_size_feed_forward",
        "_commit_hash",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "output_router_logits",
        "return_dict",
        "tie_last_hidden_states",
        "torchscript",
        "use_bfloat16",
        "use_mamba_kernels",
        # of heads for other tasks
        "classifier_dropout",
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "task_specific_params",
        # of generation, as version 4 wrote them: they belong in generation_config.json
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_logits_to_keep",
        "num_return_sequences",
        "output_scores",
        "prefix",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "typical_p",
    )
)
"""Fields of every config.json that mean nothing to the model."""

MARKERS = (
    # which program wrote the file, or which of several equal kernels it used
    "*flash_attn*",
    "*flash_attention*",
    "*flashattn*",
    "*unsloth*",
    "attn_impl",
    "fused_*",
    "gradient_checkpointing",
    "is_*_config",
    "library_name",
    "license",
    "mlx_*",
    "transformers.js_config",
    "use_fused_*",
    "use_sdpa",
    "use_xformers*",
)
"""Patterns of fields that no version of transformers reads: other programs leave them in a config.json."""

HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "embd_pdrop": (0,),
    "embedding_multiplier": (1,),
    "ep_size": (1,),
    "hidden_dropout": (0,),
    "hidden_dropout_prob": (0,),
    "logits_scaling": (1,),
    "moe_intermediate_size": (0,),
    "n_routed_experts": (0,),
    "n_shared_experts": (0,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "num_nextn_predict_layers": (0,),
    "partial_rotary_factor": (1,),
    "pretraining_tp": (1,),
    "resid_pdrop": (0,),
    "residual_dropout": (0,),
    "residual_multiplier": (1,),
    "rotary_pct": (1,),
    "shared_expert_intermediate_size": (0,),
}
"""What is true of each architecture that has no such field: nothing is dropped, scaled, shared or added."""

STORAGE = "quantization_config"
SHOWN = frozenset(
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
"""Fields that a reader looks for, and that are written also where they have our default."""

SHAPING = frozenset(
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
"""Fields of documents that change what a model computes or which parameters it has: none of them is left out."""
