"""The meaning of a config.json according to the config classes of transformers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Config = dict[str, Any]
PUBLISHED = {file.stem: file for file in sorted((Path(__file__).parent / "huggingface").glob("*.json"))}


def make_transformers_config(config: Config) -> Any:
    """Return the config object of transformers."""
    given = json.loads(json.dumps(config))
    cls = CONFIG_MAPPING[given.pop("model_type")]
    if "time_step_limit" in given:
        given["time_step_limit"] = [math.inf if isinstance(one, dict) else one for one in given["time_step_limit"]]
    return cls(**given)


def write_with_transformers_5(config: Config) -> Config:
    """Return the config.json that version 5 of transformers writes."""
    written: Config = json.loads(make_transformers_config(config).to_json_string(use_diff=False))
    return {name: value for name, value in written.items() if name != "_name_or_path"}


_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_NO_EFFECT = {
    "architectures",
    "chunk_size",  # affects how a scan is computed
    "id2label",
    "label2id",
    "pretraining_tp",  # affects how matrices are multiplied
    "rescale_prenorm_residual",  # affects initial weights
    "task_specific_params",
    "transformers_version",
    "use_cache",
}


def meaning(config: Config) -> Config:
    """Return the fields of transformers' class, normalised so that equal models compare equal."""
    read = make_transformers_config(config)
    known = {field.name for field in dataclasses.fields(read)} | {"_name_or_path", "scale_decoder_outputs"}
    fields = {name: value for name, value in vars(read).items() if name in known - _NO_EFFECT}
    fields["dtype"] = str(read.dtype or "torch.float32")
    for name in ("hidden_act", "activation_function", "mlp_hidden_act"):
        if fields.get(name) in _TANH:
            fields[name] = "gelu by tanh"
        elif fields.get(name) == "swish":
            fields[name] = "silu"
    if read.model_type not in ("mamba2", "t5"):
        share = read.hidden_size // read.num_attention_heads
        fields["head_dim"] = getattr(read, "head_dim", None) or share
    if isinstance(rope := fields.get("rope_parameters"), dict):
        rope = {key: value for key, value in rope.items() if key != "type"}
        if rope.pop("partial_rotary_factor", 1) != 1:
            fields["partial"] = read.rope_parameters["partial_rotary_factor"]
        if rope["rope_type"] == "yarn":
            rope = {"beta_fast": 32, "beta_slow": 1, "truncate": True} | rope
            rope.pop("attention_factor", None)
        if rope["rope_type"] == "default":
            rope.pop("original_max_position_embeddings", None)
        fields["rope_parameters"] = rope
    fields.pop("max_window_layers", None)  # layer_types has it
    if "sliding_attention" not in fields.get("layer_types", ["sliding_attention"]):
        fields.pop("sliding_window", None)
        fields.pop("use_sliding_window", None)
    if "time_step_limit" in fields:
        fields["time_step_limit"] = list(fields["time_step_limit"])
    if hasattr(read, "decoder_sparse_step"):
        del fields["decoder_sparse_step"], fields["mlp_only_layers"]
        fields["sparse"] = [
            (layer + 1) % read.decoder_sparse_step == 0 and layer not in read.mlp_only_layers
            for layer in range(read.num_hidden_layers)
        ]
    if read.model_type == "deepseek_v2" and read.topk_method == "greedy":
        fields["n_group"] = fields["topk_group"] = None
    if read.model_type == "deepseek_v3" and read.n_group == 1:
        fields["topk_group"] = 1
    if fields.get("attention_dropout") is None:
        fields["attention_dropout"] = 0.0
    return fields


def without_experts(fields: Config) -> Config:
    """Return the meaning of a Nemotron-H without its expert fields."""
    prefixes = ("moe_", "n_routed", "n_shared", "num_experts", "routed_", "n_group", "topk_", "norm_topk")
    kept = {name: value for name, value in fields.items() if not name.startswith(prefixes)}
    return kept | {"n_groups": fields["n_groups"]}


def missing_tokens(config: Config) -> Config:
    """Return the special tokens that version 5 writes although the file does not set them."""
    read = make_transformers_config(config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(read, name) for name in names if name not in config and hasattr(read, name)}
