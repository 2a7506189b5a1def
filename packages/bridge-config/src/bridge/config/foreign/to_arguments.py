"""Describe a GPT by the arguments of Megatron-LM's `pretrain_gpt.py`.

The reader of arguments (`bridge.config.foreign.megatron_args`) is the measure: `bridge.config.megatron_lm` reads what
is chosen here back and compares, so a field without an argument cannot get lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from bridge.config.foreign.argument_names import (
    ACTIVATIONS,
    MODEL_FIELDS,
    NEGATED_FLAGS,
    PATTERN_FIELDS,
    RENAMED_FIELDS,
    YARN_FIELDS,
    get_options,
    load_arguments,
)
from bridge.config.foreign.conversion import is_off

_FIRST = ("num_layers", "hidden_size", "num_attention_heads")
# Fields of the transformer that are converted together with others. init_method has no argument that works: with
# --init-method-xavier-uniform, megatron-core 0.19.2 passes TransformerConfig a field that it does not have.
_CHOSEN_TOGETHER = frozenset(
    [
        "activation_func",
        "gated_linear_unit",
        "bias_activation_fusion",
        "num_query_groups",
        "virtual_pipeline_model_parallel_size",
    ]
)
_BY_FIELD = {
    **{field: name for name, (field, _) in YARN_FIELDS.items()},
    **{field: name for name, field in RENAMED_FIELDS.items() if name in load_arguments()},
    **{field: name for name, field in NEGATED_FLAGS.items() if name in load_arguments()},
}


def choose_arguments(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that describe a GPT and differ from their defaults, by name.

    Fields without an argument are left out.

    Args:
        model: A GPT in canonical form with defaults.
    """
    chosen = dict.fromkeys(_FIRST) | _choose_for_transformer(model) | _choose_for_model(model)
    # Training samples are as long as the model allows; Megatron-LM requires this argument.
    chosen["seq_length"] = model["seq_length"]
    return {name: value for name, value in chosen.items() if not _is_default(name, value)}


def _choose_for_transformer(model: Mapping[str, Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    transformer, known = model["transformer"], load_arguments()
    for field, value in transformer.items():
        name = field if field in known else _BY_FIELD.get(field)
        if name is not None and field not in _CHOSEN_TOGETHER and not has_no_effect(field, model):
            chosen[name] = not value if name in NEGATED_FLAGS else value
    activation = (transformer["activation_func"], transformer["gated_linear_unit"])
    chosen |= {name: activation == known_activation for name, known_activation in ACTIVATIONS.items()}
    fusion = "bias_swiglu_fusion" if chosen["swiglu"] else "bias_gelu_fusion"
    groups = transformer["num_query_groups"]
    return chosen | {
        fusion: transformer["bias_activation_fusion"],
        "group_query_attention": groups is not None,
        "num_query_groups": groups,
        "num_virtual_stages_per_pipeline_rank": transformer["virtual_pipeline_model_parallel_size"],
    }


def _choose_for_model(model: Mapping[str, Any]) -> dict[str, Any]:
    known = load_arguments()
    chosen = {
        name: model[name] for name in model if name in known and name not in ("seq_length", "rope_scaling_factor")
    }
    chosen |= {name: model[field] for name, field in MODEL_FIELDS.items()}
    if not model["should_pad_vocab"]:
        chosen["padded_vocab_size"] = chosen.pop("vocab_size")
    chosen["untie_embeddings_and_output_weights"] = not model["share_embeddings_and_output_weights"]
    if model["transformer"].get("rotary_base") is not None:  # with latent attention, the transformer has these
        chosen |= {name: model["transformer"][name] for name in ("rotary_base", "rotary_percent")}
    return chosen


def has_no_effect(field: str, model: Mapping[str, Any]) -> bool:
    """Return whether Megatron-LM may set this field differently without an effect on what the model computes."""
    transformer = model["transformer"]
    match field:
        case "inference_sampling_seed" | "deallocate_pipeline_outputs":
            return True
        case "pipeline_dtype":  # Megatron-LM takes params_dtype, as megatron-core requires
            return transformer["pipeline_dtype"] is None
        case "add_qkv_bias":
            return bool(transformer["add_bias_linear"])
        case "apply_rope_fusion":
            return bool(model["position_embedding_type"] != "rope")
        case "sequence_parallel":
            return bool(transformer["tensor_model_parallel_size"] == 1)
        case "cp_comm_type":
            return transformer["cp_comm_type"] is None or bool(transformer["context_parallel_size"] == 1)
        case "overlap_p2p_comm" | "batch_p2p_comm":
            return transformer["virtual_pipeline_model_parallel_size"] is None
        case "cuda_graph_modules" | "cuda_graph_scope":
            return bool(transformer["cuda_graph_impl"] == "none")
        case "make_vocab_size_divisible_by":
            return not model["should_pad_vocab"]
        case "rope_scaling_factor":
            return not model["rope_scaling"]
        case "rotary_base" | "rotary_percent":  # of the model, if the transformer has its own
            return field in transformer
    return False


def _is_default(name: str, value: Any) -> bool:
    """Return whether an argument has this value if it is not given."""
    default = load_arguments()[name]
    if isinstance(default, str):
        default = default.rpartition(".")[2]  # an enum member, as `str` writes it
    if default == [value]:
        return True
    return value == default or (is_off(value) and is_off(default))


def derive_arguments(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments as Megatron-LM has them after its checks, which change some (`validate_args`, 0.19.2)."""
    args = load_arguments() | dict(chosen)
    stages = args["num_virtual_stages_per_pipeline_rank"]
    args["virtual_pipeline_model_parallel_size"] = stages if stages != 1 else None
    changes = [
        ("add_qkv_bias", True, args["add_bias_linear"]),
        ("bias_gelu_fusion", False, not args["add_bias_linear"]),
        ("apply_rope_fusion", False, args["position_embedding_type"] != "rope"),
        ("sequence_parallel", False, args["tensor_model_parallel_size"] == 1),
        ("overlap_p2p_comm", False, args["virtual_pipeline_model_parallel_size"] is None),
        ("attention_softmax_in_fp32", True, args["apply_query_key_layer_scaling"]),
        ("cpu_offloading", True, args["cpu_offloading_num_layers"] > 0),
    ]
    return args | {name: value for name, value, applies in changes if applies}


def format_arguments(chosen: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the words of each argument: an option, and its values. An argument that no option can set is left out."""
    return {name: words for name, value in chosen.items() if (words := _format_argument(name, value))}


def _format_argument(name: str, value: Any) -> list[str]:
    for option, sets in get_options(name).items():
        if sets is None and value is not None and not isinstance(value, dict):
            return _join(option, _format_value(name, value))
        if isinstance(sets, list) and value:
            return [option, *(_format_value(name, item) for item in (value if isinstance(value, list) else [value]))]
        if isinstance(sets, bool) and value is sets:
            return [option]
    return []


def _join(option: str, value: str) -> list[str]:
    """Return an option with its value; argparse takes a value that begins with a hyphen only after an equals sign."""
    return [f"{option}={value}"] if value.startswith("-") else [option, value]


def _format_value(name: str, value: Any) -> str:
    if isinstance(value, list) and name in PATTERN_FIELDS:
        return "+".join(f"[{item}]*{len(list(same))}" for item, same in groupby(value))
    if isinstance(value, list):
        return f"({','.join(map(str, value))})"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))  # some of these options take only integers
    return str(value)
