"""Megatron-LM's arguments by name: the fields that they set, and those that concern only the training run."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

# Names that identify Megatron-LM's arguments.
MARKERS = frozenset(
    [
        "untie_embeddings_and_output_weights",
        "padded_vocab_size",
        "swiglu",
        "bias_gelu_fusion",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_experts",
        "group_query_attention",
        "rotary_seq_len_interpolation_factor",
        "micro_batch_size",
        "tokenizer_type",
    ]
)
# Arguments that switch a field off, and the field.
NEGATED_FLAGS = {"no_persist_layer_norm": "persist_layer_norm", "disable_bias_linear": "add_bias_linear"}
# Fields of the transformer that have another name in Megatron-LM.
RENAMED_FIELDS = {
    "num_experts": "num_moe_experts",
    "decoder_first_pipeline_num_layers": "num_layers_in_first_pipeline_stage",
    "decoder_last_pipeline_num_layers": "num_layers_in_last_pipeline_stage",
    "fp8_param_gather": "fp8_param",
    "fp4_param_gather": "fp4_param",
    "seed": "inference_sampling_seed",
    "model_parallel_size": "tensor_model_parallel_size",
    "norm_epsilon": "layernorm_epsilon",
}
# Fields of the model that have another name in Megatron-LM.
MODEL_FIELDS = {
    "max_position_embeddings": "seq_length",
    "use_rope_scaling": "rope_scaling",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
}
# Arguments that are converted together with others, by name.
COMBINED = frozenset(
    [
        "num_layers",
        "encoder_num_layers",
        "decoder_num_layers",
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
        "swiglu",
        "squared_relu",
        "quick_geglu",
        "bias_gelu_fusion",
        "bias_swiglu_fusion",
        "init_method_xavier_uniform",
        "group_query_attention",
        "num_query_groups",
        "rope_type",
        "cp_comm_type",
        "ffn_hidden_size",
        "hybrid_layer_pattern",
        "hybrid_override_pattern",
        "mtp_hybrid_override_pattern",
        "padded_vocab_size",
        "vocab_size",
        "make_vocab_size_divisible_by",
        "untie_embeddings_and_output_weights",
        "position_embedding_type",
        "use_rotary_position_embeddings",
        "add_position_embedding",
        "rope_scaling_factor",
        "heterogeneous_layers_config_path",
        "seq_length",
        "spec",
        "model_type",
    ]
)
# Arguments that change the model in a way that no field expresses, and what to do about them.
REFUSED = {
    "kitchen_config_file": "Bridge does not support Kitchen layers",
    "kitchen_recipe_number": "Bridge does not support Kitchen layers",
    "te_precision_config_file": "Bridge does not read this file: put its contents into transformer.quant_recipe",
    "yaml_cfg": "the model is described in that file, in a format that Bridge does not read",
    "retro_add_retriever": "Bridge does not support RETRO models",
    "hybrid_attention_ratio": "ratios are no longer supported: list the layers in hybrid_layer_pattern",
    "hybrid_mlp_ratio": "ratios are no longer supported: list the layers in hybrid_layer_pattern",
    "pipeline_model_parallel_split_rank": "megatron-core no longer splits the pipeline between encoder and decoder",
    "encoder_tensor_model_parallel_size": "megatron-core no longer has separate ranks for the encoder",
    "encoder_pipeline_model_parallel_size": "megatron-core no longer has separate ranks for the encoder",
    "vision_pretraining": "Bridge does not support vision models",
}
# Prefixes of names that concern only the training run and that the parser of megatron-core 0.19.2 lacks: set during the
# run, or arguments of earlier versions.
RUN_ARGUMENTS = re.compile(
    "DDP_impl|activations_checkpoint_|adam_|adlr_|async_|auto_detect_|batch_size|bert_|biencoder_|checkpoint_|ckpt_|consumed_|"
    "curr_iteration|data_|dataloader_|dataset_|ddp_|delay_grad_reduce|delay_param_gather|dino_|dist_ckpt_|"
    "distribute_checkpointed_activations|do_(test|train|valid)|embedder_|enable_one_logger|error_injection_|eval_|exit_|"
    "expert_parallel|fim_|fsdp_|ft_|ict_|inference_|iteration|log_|logging_|lr_|mmap_warmup|no_async_|num_floating_point_|"
    "num_workers|one_logger_|optimizer_|profile|rampup_|rank|rerun_|retriever_|retro_|rl_|save_|"
    "scatter_gather_tensors_in_pipeline|skipped_train_samples|straggler_|tensorboard_|tokenizer_|train_|"
    "transformer_pipeline_model_parallel_size|use_contiguous_buffers_in_local_ddp|use_dist_ckpt|"
    "use_layer_wise_distributed_optimizer|use_(legacy|mcore)_models|use_ring_exchange_p2p|valid_|wandb_|warmup|world_size"
)
# Specs that name the layers that Bridge selects by default.
DEFAULT_SPECS = (
    ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"],
    ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"],
)
# Arguments of YaRN: the field, and Megatron-LM's default.
YARN_FIELDS = {
    "rotary_scaling_factor": ("yarn_rotary_scaling_factor", 1.0),
    "yarn_original_max_position_embeddings": ("yarn_original_max_position_embeddings", 4096),
    "yarn_beta_fast": ("yarn_beta_fast", 32.0),
    "yarn_beta_slow": ("yarn_beta_slow", 1.0),
    "mscale": ("yarn_mscale", 1.0),
    "mscale_all_dim": ("yarn_mscale_all_dim", 0.0),
    "yarn_correction_range_round_to_int": ("yarn_correction_range_round_to_int", True),
}
# Fields that Megatron-LM's parser also accepts as text: an integer, or lists joined by + and *.
PATTERN_FIELDS = frozenset(["moe_layer_freq", "linear_attention_freq", "no_rope_freq", "window_attn_skip_freq"])
ACTIVATIONS: dict[str, tuple[str, bool]] = {
    "swiglu": ("torch.nn.functional.silu", True),
    "squared_relu": ("megatron.core.activations.squared_relu", False),
    "quick_geglu": ("megatron.core.fusions.fused_bias_geglu.quick_gelu", True),
}


def load_arguments() -> dict[str, Any]:
    """Return Megatron-LM's arguments and their defaults from the shipped list."""
    arguments: dict[str, Any] = _load_list()["arguments"]
    return arguments


def get_options(name: str) -> dict[str, Any]:
    """Return the options of an argument: the constant that each sets, None if it takes a value, [] if several."""
    options: dict[str, Any] = _load_list()["options"].get(name) or {f"--{name.replace('_', '-')}": None}
    return options


@cache
def _load_list() -> dict[str, dict[str, Any]]:
    text = files("bridge.config.foreign").joinpath("arguments.json").read_text(encoding="utf-8")
    loaded: dict[str, dict[str, Any]] = json.loads(text)
    return loaded
