"""What a config.json means, by transformers' own config classes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Config = dict[str, Any]
PUBLISHED = {file.stem: file for file in sorted((Path(__file__).parent / "huggingface").glob("*.json"))}


def made(config: Config) -> Any:
    """The config object of transformers."""
    given = json.loads(json.dumps(config))
    cls = CONFIG_MAPPING[given.pop("model_type")]
    if "time_step_limit" in given:
        given["time_step_limit"] = [math.inf if isinstance(one, dict) else one for one in given["time_step_limit"]]
    return cls(**given)


def saved(config: Config) -> Config:
    """The config.json that version 5 of transformers writes."""
    written: Config = json.loads(made(config).to_json_string(use_diff=False))
    return {name: value for name, value in written.items() if name != "_name_or_path"}


_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_SAYS_NOTHING = {
    "architectures",
    "chunk_size",  # how a scan is computed
    "id2label",
    "label2id",
    "pretraining_tp",  # how matrices are multiplied
    "rescale_prenorm_residual",  # the first weights
    "task_specific_params",
    "transformers_version",
    "use_cache",
}


def meaning(config: Config) -> Config:
    """The fields of the class, with what is the same model made the same."""
    read = made(config)
    known = {field.name for field in dataclasses.fields(read)} | {"_name_or_path", "scale_decoder_outputs"}
    told = {name: value for name, value in vars(read).items() if name in known - _SAYS_NOTHING}
    told["dtype"] = str(read.dtype or "torch.float32")
    for name in ("hidden_act", "activation_function", "mlp_hidden_act"):
        if told.get(name) in _TANH:
            told[name] = "gelu by tanh"
        elif told.get(name) == "swish":
            told[name] = "silu"
    if read.model_type not in ("mamba2", "t5"):
        share = read.hidden_size // read.num_attention_heads
        told["head_dim"] = getattr(read, "head_dim", None) or share
    if isinstance(rope := told.get("rope_parameters"), dict):
        rope = {key: value for key, value in rope.items() if key != "type"}
        if rope.pop("partial_rotary_factor", 1) != 1:
            told["partial"] = read.rope_parameters["partial_rotary_factor"]
        if rope["rope_type"] == "yarn":
            rope = {"beta_fast": 32, "beta_slow": 1, "truncate": True} | rope
            rope.pop("attention_factor", None)
        if rope["rope_type"] == "default":
            rope.pop("original_max_position_embeddings", None)
        told["rope_parameters"] = rope
    told.pop("max_window_layers", None)  # layer_types has it
    if "sliding_attention" not in told.get("layer_types", ["sliding_attention"]):
        told.pop("sliding_window", None)
        told.pop("use_sliding_window", None)
    if "time_step_limit" in told:
        told["time_step_limit"] = list(told["time_step_limit"])
    if hasattr(read, "decoder_sparse_step"):
        del told["decoder_sparse_step"], told["mlp_only_layers"]
        told["sparse"] = [
            (layer + 1) % read.decoder_sparse_step == 0 and layer not in read.mlp_only_layers
            for layer in range(read.num_hidden_layers)
        ]
    if read.model_type == "deepseek_v2" and read.topk_method == "greedy":
        told["n_group"] = told["topk_group"] = None
    if read.model_type == "deepseek_v3" and read.n_group == 1:
        told["topk_group"] = 1
    if told.get("attention_dropout") is None:
        told["attention_dropout"] = 0.0
    return told


def without_experts(told: Config) -> Config:
    """What is told of a Nemotron-H without its fields of experts."""
    prefixes = ("moe_", "n_routed", "n_shared", "num_experts", "routed_", "n_group", "topk_", "norm_topk")
    kept = {name: value for name, value in told.items() if not name.startswith(prefixes)}
    return kept | {"n_groups": told["n_groups"]}


def missing_tokens(config: Config) -> Config:
    """The tokens that version 5 writes out, where a file says nothing of them."""
    read = made(config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(read, name) for name in names if name not in config and hasattr(read, name)}
