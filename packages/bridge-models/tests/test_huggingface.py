"""From config.json to a document and back, judged by transformers' own config classes, for every architecture."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bridge.config import Document, DocumentError
from bridge.models.commands import from_hf as from_hf_command
from bridge.models.commands import to_hf as to_hf_command
from bridge.models.gpt import GPTModelConfig
from bridge.models.huggingface import from_hf, load_config_json, to_hf
from bridge.models.huggingface.convert import ARCHITECTURES, SHAPING
from bridge.models.transformer import YarnTransformerConfig

Config = dict[str, Any]

PUBLISHED = {file.stem: file for file in sorted((Path(__file__).parent / "huggingface").glob("*.json"))}
REFUSED = {"deepseek-ai--DeepSeek-V2": "$.topk_method"}

# --- What a config.json means, as transformers reads it


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


# --- Published files


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_come_back(name: str) -> None:
    published = load_config_json(str(PUBLISHED[name])).data
    if name in REFUSED:
        with pytest.raises(DocumentError) as error:
            from_hf(published)
        assert [problem.path for problem in error.value.problems] == [REFUSED[name]]
        return
    document = from_hf(published).data
    Document(document).check()
    came_back = to_hf(document).data
    (architecture,) = came_back["architectures"]
    assert hasattr(transformers, architecture)
    assert meaning(came_back) == meaning(published)
    again = from_hf(came_back).data
    assert to_hf(again).data == came_back
    other_spelling = from_hf(saved(published)).data
    assert to_hf(other_spelling).data == {
        name: value for name, value in came_back.items() if name != "_name_or_path"
    } | missing_tokens(published)


def missing_tokens(config: Config) -> Config:
    """The tokens that version 5 writes out, where a file says nothing of them."""
    read = made(config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(read, name) for name in names if name not in config and hasattr(read, name)}


# --- Any files


def one_in(*values: Any) -> SearchStrategy[Any]:
    return st.sampled_from(values)


SIZES = st.integers(1, 512)
SHARES = st.floats(0, 1, width=16)
TOKENS = st.none() | st.integers(0, 15)
ACTIVATIONS = one_in("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu")
FLAGS = st.booleans()
FACTORS = st.integers(1, 64) | st.floats(1, 64, width=16)
EPSILONS = one_in(1e-8, 1e-6, 1e-5, 1e-3)

COMMON = {
    "vocab_size": st.integers(60000, 300000),  # more than any token that a class has by default
    "initializer_range": SHARES,
    "tie_word_embeddings": FLAGS,
    "bos_token_id": TOKENS,
    "eos_token_id": TOKENS | st.lists(st.integers(0, 15), min_size=1, max_size=3),
    "pad_token_id": TOKENS,
    "dtype": one_in(None, "float32", "bfloat16", "float16"),
    "use_cache": FLAGS,
}
DECODER = COMMON | {
    "max_position_embeddings": st.integers(9000, 100000),
    "intermediate_size": SIZES,
    "num_key_value_heads": one_in(1, 2),
    "attention_dropout": SHARES,
    "rms_norm_eps": EPSILONS,
    "hidden_act": ACTIVATIONS,
}


@st.composite
def ropes(draw: DrawFn, kinds: tuple[str, ...]) -> Config:
    """``rope_theta`` and, at times, ``rope_scaling``, as version 4 has them."""
    config: Config = draw(st.fixed_dictionaries({}, optional={"rope_theta": st.integers(1, 10**7).map(float)}))
    kind = draw(one_in(None, "default", *kinds))
    scaling: Config = {"rope_type": kind}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind == "yarn":
        scaling |= draw(
            st.fixed_dictionaries(
                {"original_max_position_embeddings": st.integers(1, 8192)},
                optional={"beta_fast": one_in(32, 16.0), "beta_slow": one_in(1, 2.0), "truncate": FLAGS},
            )
        )
        if draw(FLAGS):
            scaling |= {"mscale": draw(one_in(0.5, 1)), "mscale_all_dim": draw(one_in(0.5, 1))}
    if kind in ("linear", "llama3", "yarn"):
        scaling["factor"] = draw(FACTORS)
    return config | ({} if kind is None else {"rope_scaling": scaling})


@st.composite
def windows(draw: DrawFn, layers: int) -> Config:
    """Windows of Qwen2 and Qwen3."""
    config: Config = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "use_sliding_window": FLAGS,
                "sliding_window": st.integers(1, 64),
                "max_window_layers": st.integers(0, layers),
            },
        )
    )
    if config.get("use_sliding_window") and draw(FLAGS):
        config["layer_types"] = draw(layer_types(layers))
    return config


def layer_types(layers: int) -> SearchStrategy[list[str]]:
    return st.lists(one_in("sliding_attention", "full_attention"), min_size=layers, max_size=layers)


def fields(
    required: dict[str, SearchStrategy[Any]], optional: dict[str, SearchStrategy[Any]]
) -> SearchStrategy[Config]:
    return st.fixed_dictionaries(required, optional=optional)


@st.composite
def decoders(
    draw: DrawFn,
    model_type: str,
    more: Callable[[int], SearchStrategy[Config]] = lambda layers: st.just({}),
    without: tuple[str, ...] = (),
    kinds: tuple[str, ...] = ("linear", "llama3", "yarn"),
) -> Config:
    """A decoder in the manner of Llama."""
    heads, layers = draw(one_in(2, 4, 8)), draw(st.integers(1, 6))
    shape = {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": heads * draw(one_in(2, 8, 16)),
    }
    if "head_dim" not in without and draw(FLAGS):
        shape["head_dim"] = draw(one_in(4, 8))
    optional = {name: strategy for name, strategy in DECODER.items() if name not in without}
    return shape | draw(fields({}, optional)) | draw(ropes(kinds)) | draw(more(layers))


def of_experts(number: str, width: bool = True) -> dict[str, SearchStrategy[Any]]:
    wide = {"moe_intermediate_size": SIZES} if width else {}
    return {number: st.integers(8, 16), "num_experts_per_tok": st.integers(2, 8), "router_aux_loss_coef": SHARES} | wide


def sparse(layers: int) -> SearchStrategy[Config]:
    """Which layers have experts; the last one does."""
    return st.fixed_dictionaries(
        {},
        optional={
            "decoder_sparse_step": one_in(*(step for step in (1, 2, 3) if layers % step == 0)),
            "mlp_only_layers": st.lists(st.integers(0, 6).filter(lambda layer: layer != layers - 1), max_size=3),
        },
    )


def both(*parts: SearchStrategy[Config]) -> SearchStrategy[Config]:
    return st.tuples(*parts).map(lambda found: {name: value for part in found for name, value in part.items()})


@st.composite
def gpt2s(draw: DrawFn) -> Config:
    heads = draw(one_in(1, 2, 4))
    dropout = draw(SHARES)
    optional = COMMON | {
        "n_positions": SIZES,
        "n_layer": SIZES,
        "n_inner": SIZES,
        "attn_pdrop": SHARES,
        "layer_norm_epsilon": EPSILONS,
        "activation_function": ACTIVATIONS,
    }
    shape = {"model_type": "gpt2", "n_head": heads, "n_embd": heads * draw(SIZES)}
    return shape | draw(fields({}, optional)) | {"resid_pdrop": dropout, "embd_pdrop": dropout}


@st.composite
def gemmas(draw: DrawFn) -> Config:
    config: Config = draw(decoders("gemma", without=("hidden_act",)))
    return config | draw(fields({}, {"hidden_act": one_in("gelu", "gelu_pytorch_tanh", "silu", "relu")}))


@st.composite
def phi3s(draw: DrawFn) -> Config:
    dropout = draw(SHARES)
    config: Config = draw(decoders("phi3", without=("head_dim",), kinds=()))
    more = draw(fields({}, {"sliding_window": st.none() | SIZES, "partial_rotary_factor": one_in(0.25, 0.5, 1.0)}))
    return config | more | {"resid_pdrop": dropout, "embd_pdrop": dropout}


@st.composite
def deepseeks(draw: DrawFn, model_type: str) -> Config:
    without = ("head_dim", "num_key_value_heads", "rms_norm_eps")
    config: Config = draw(decoders(model_type, without=without, kinds=("yarn",)))
    if (scaling := config.get("rope_scaling")) is not None:
        scaling.pop("truncate", None)
    layers = config["num_hidden_layers"]
    optional = {
        "q_lora_rank": st.none() | SIZES,
        "kv_lora_rank": SIZES,
        "qk_nope_head_dim": SIZES,
        "qk_rope_head_dim": st.integers(1, 8).map(lambda half: 2 * half),
        "v_head_dim": SIZES,
        "moe_intermediate_size": SIZES,
        "n_shared_experts": st.integers(1, 4),
        "routed_scaling_factor": one_in(1.0, 2.5, 16.0),
        "attention_bias": st.just(False),
        "pretraining_tp": st.just(1),
        "ep_size": st.just(1),
        "moe_layer_freq": st.just(1),
    }
    config |= draw(fields({"first_k_dense_replace": st.integers(0, layers - 1)}, optional))
    config |= {
        "num_key_value_heads": config["num_attention_heads"],
        "n_routed_experts": 16,
        "num_experts_per_tok": draw(one_in(2, 4, 6, 8)),
    }
    chosen = config["num_experts_per_tok"]
    if model_type == "deepseek_v2":
        groups = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": chosen}
        return config | (groups if draw(FLAGS) else {"topk_method": "greedy", "n_group": 1, "topk_group": 1})
    config |= draw(one_in({"n_group": 1, "topk_group": 1}, {"n_group": 8, "topk_group": chosen // 2}))
    return config | draw(fields({}, {"num_nextn_predict_layers": st.integers(0, 2), "norm_topk_prob": st.just(True)}))


@st.composite
def mamba2s(draw: DrawFn) -> Config:
    heads, channels = draw(one_in(4, 8)), draw(one_in(4, 8))
    optional = {name: strategy for name, strategy in COMMON.items()} | {
        "state_size": SIZES,
        "residual_in_fp32": FLAGS,
        "num_hidden_layers": SIZES,
        "time_step_limit": st.just([0.0, {"__float__": "Infinity"}]),
        "norm_before_gate": FLAGS,
    }
    expand = draw(one_in(1, 2, 4))
    shape = {"num_heads": heads, "head_dim": channels, "expand": expand, "hidden_size": heads * channels // expand}
    return {"model_type": "mamba2", "n_groups": draw(one_in(1, 2, 4))} | shape | draw(fields({}, optional))


@st.composite
def nemotrons(draw: DrawFn) -> Config:
    pattern = draw(st.text("M*-E", min_size=1, max_size=6))
    optional = COMMON | {
        "max_position_embeddings": SIZES,
        "hidden_size": SIZES.map(lambda size: 8 * size),
        "intermediate_size": SIZES,
        "num_key_value_heads": one_in(1, 2),
        "head_dim": SIZES,
        "ssm_state_size": SIZES,
        "mamba_num_heads": SIZES,
        "mamba_head_dim": SIZES,
        "n_groups": SIZES,
        "mlp_hidden_act": ACTIVATIONS,
        "attention_dropout": SHARES,
        "hidden_dropout": SHARES,
        "residual_in_fp32": FLAGS,
        "n_routed_experts": st.integers(8, 16),
        "num_experts_per_tok": st.integers(2, 8),
        "moe_intermediate_size": SIZES,
        "moe_shared_expert_intermediate_size": SIZES,
        "moe_latent_size": st.none() | SIZES,
        "routed_scaling_factor": one_in(1.0, 2.5),
    }
    config = {"model_type": "nemotron_h", "num_attention_heads": 8} | draw(fields({}, optional))
    names = {"M": one_in("mamba", "linear_attention"), "*": one_in("attention", "full_attention")}
    names |= {"-": st.just("mlp"), "E": st.just("moe")}
    if draw(FLAGS):
        return config | {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    return config | {"layers_block_type": [draw(names[symbol]) for symbol in pattern]}


@st.composite
def t5s(draw: DrawFn) -> Config:
    optional = {name: COMMON[name] for name in ("vocab_size", "eos_token_id", "pad_token_id", "dtype")} | {
        "d_model": SIZES,
        "d_kv": SIZES,
        "d_ff": SIZES,
        "num_layers": SIZES,
        "num_decoder_layers": SIZES | st.none(),
        "num_heads": SIZES,
        "relative_attention_num_buckets": SIZES,
        "relative_attention_max_distance": SIZES,
        "dropout_rate": SHARES,
        "layer_norm_epsilon": EPSILONS,
        "feed_forward_proj": one_in("relu", "gelu", "gelu_new", "gated-gelu", "gated-silu", "gated-relu"),
        "tie_word_embeddings": FLAGS,
        "decoder_start_token_id": TOKENS,
    }
    return {"model_type": "t5"} | draw(fields({}, optional))


FAMILIES: dict[str, SearchStrategy[Config]] = {
    "gpt2": gpt2s(),
    "llama": one_in({}, {"attention_bias": True, "mlp_bias": True}).flatmap(
        lambda biases: decoders("llama").map(lambda config: config | biases)
    ),
    "mistral": decoders("mistral", lambda layers: fields({}, {"sliding_window": st.none() | SIZES})),
    "qwen2": decoders("qwen2", windows, without=("head_dim",)),
    "qwen3": decoders("qwen3", windows),
    "phi3": phi3s(),
    "gemma": gemmas(),
    "mixtral": decoders(
        "mixtral",
        lambda layers: fields({}, {"sliding_window": st.none() | SIZES} | of_experts("num_local_experts", width=False)),
    ),
    "qwen2_moe": decoders(
        "qwen2_moe",
        lambda layers: both(
            fields({}, of_experts("num_experts") | {"norm_topk_prob": FLAGS, "qkv_bias": FLAGS}),
            fields({}, {"shared_expert_intermediate_size": SIZES}),
            sparse(layers),
            windows(layers),
        ),
        without=("head_dim",),
    ),
    "qwen3_moe": decoders(
        "qwen3_moe",
        lambda layers: both(
            fields({}, of_experts("num_experts") | {"norm_topk_prob": FLAGS}),
            sparse(layers),
            fields({}, {"use_sliding_window": FLAGS, "sliding_window": SIZES}),
        ),
    ),
    "gpt_oss": decoders(
        "gpt_oss",
        lambda layers: fields(
            {},
            of_experts("num_local_experts", width=False)
            | {"sliding_window": SIZES, "layer_types": layer_types(layers), "swiglu_limit": one_in(7.0, 3.5)},
        ),
        without=("hidden_act",),
    ),
    "deepseek_v2": deepseeks("deepseek_v2"),
    "deepseek_v3": deepseeks("deepseek_v3"),
    "mamba2": mamba2s(),
    "nemotron_h": nemotrons(),
    "t5": t5s(),
}


def spelled(config: Config, version: int, *, old_type: bool) -> Config:
    """The same in the spelling of a version of transformers."""
    config = json.loads(json.dumps(config))
    scaling = config.pop("rope_scaling", None)
    if version == 4:
        if "dtype" in config:
            config["torch_dtype"] = config.pop("dtype")
        if scaling is not None:
            if old_type:
                scaling["type"] = scaling.pop("rope_type")
            config["rope_scaling"] = scaling
        return config
    parameters = scaling or {}
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in config:
            parameters[name] = config.pop(name)
    if parameters:
        config["rope_parameters"] = {"rope_type": "default"} | parameters
    return config


def test_every_architecture_is_drawn() -> None:
    assert FAMILIES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("model_type", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_file_comes_back(model_type: str, data: st.DataObject) -> None:
    config = data.draw(FAMILIES[model_type], label="config")
    version, old_type = data.draw(one_in(4, 5), label="version"), data.draw(FLAGS, label="old type")
    config = spelled(config, version, old_type=old_type)
    document = from_hf(config).data
    came_back = to_hf(document).data
    told, told_back = meaning(config), meaning(came_back)
    if model_type == "nemotron_h" and "E" not in document["hybrid_layer_pattern"]:
        told, told_back = without_experts(told), without_experts(told_back)
    assert told_back == told
    assert came_back["model_type"] == model_type
    assert to_hf(from_hf(came_back).data).data == came_back
    assert to_hf(from_hf(saved(config)).data).data == came_back | missing_tokens(config)
