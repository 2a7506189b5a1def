"""Fields of config.json that do not affect the model; all others that no row handles are errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from bridge.config.errors import did_you_mean
from bridge.config.paths import format_path
from bridge.config.problems import describe_value
from bridge.models.huggingface.fields.windows import FULL
from bridge.models.huggingface.translation import Translation

IGNORED = frozenset(
    (
        "model_type",
        "architectures",
        "transformers_version",
        "use_cache",
        # behaviour of transformers' classes, not of the model
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
        # left by the GGUF file that transformers read the model from
        "_model_name_or_path",
        "unk_token_id",
        # heads for other tasks
        "classifier_dropout",
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "task_specific_params",
        # generation settings, which version 4 wrote here: they belong in generation_config.json
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
"""Fields that do not affect the model in any architecture."""

WRITTEN_BY_OTHER_TOOLS = (
    # the program that wrote the file, or the kernel that it used
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
"""Patterns of fields that other tools write to config.json, and that no version of transformers reads."""

NO_EFFECT_VALUES: Mapping[str, tuple[Any, ...]] = {
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
"""Values that have no effect on architectures without the field: no dropout, no scaling, no experts."""

QUANTIZATION = "quantization_config"


def refuse_unknown(t: Translation, name: str, known: Iterable[str]) -> None:
    """Refuse a field that no row handles; if it does not affect the model, only note that it is left out."""
    if why := _explain_no_effect(t, name):
        t.note(f"{format_path((name,))} is left out: {why}")
    else:
        free = [other for other in known if other not in t.given]  # do not suggest a field that is already set
        t.refuse(name, f"unknown to Bridge: remove it if it does not affect the model{did_you_mean(name, free)}")


def _explain_no_effect(t: Translation, name: str) -> str | None:
    """Return why an unknown field does not affect the model; None if it may."""
    value = t.given[name]
    if any(fnmatchcase(name, pattern) for pattern in WRITTEN_BY_OTHER_TOOLS):
        return "written by another tool, and not read by transformers"
    if value is None or value is False:
        return "disabled, and not a field that Bridge knows"
    if value in ("", [], {}):
        return "empty, and not a field that Bridge knows"
    # Not a boolean, because 1 == True.
    if any(value == harmless and type(value) is not bool for harmless in NO_EFFECT_VALUES.get(name, ())):
        return f"{describe_value(value)} has no effect"
    if name == "layer_types" and isinstance(value, list) and all(kind == FULL for kind in value):
        return f"all layers of {t.model_type} use full attention"
    return None
