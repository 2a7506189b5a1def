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
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bridge.config import Document, DocumentError
from bridge.config.cli import main
from bridge.config.reader import Reader
from bridge.config.tables import shipped
from bridge.models.huggingface import from_hf, load_config_json, to_hf
from bridge.models.huggingface.document_fields import AFFECTS_COMPUTATION
from bridge.models.huggingface.families import ARCHITECTURES
from bridge.models.language import LanguageModelConfig
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
    optional = COMMON | {
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
        "tie_word_embeddings": st.just(False),
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
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_file_comes_back(model_type: str, data: st.DataObject) -> None:
    config = data.draw(FAMILIES[model_type], label="config")
    version, old_type = data.draw(one_in(4, 5), label="version"), data.draw(FLAGS, label="old type")
    config = spelled(config, version, old_type=old_type)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "_wrong_fields", lambda *_: [])  # most of what is drawn could not run
        document, came_back = _there_and_back(config)
        assert to_hf(from_hf(came_back).data).data == came_back
        assert to_hf(from_hf(saved(config)).data).data == came_back | missing_tokens(config)
    told, told_back = meaning(config), meaning(came_back)
    if model_type == "nemotron_h" and "E" not in document["hybrid_layer_pattern"]:
        told, told_back = without_experts(told), without_experts(told_back)
    assert told_back == told
    assert came_back["model_type"] == model_type


def _there_and_back(config: Config) -> tuple[Config, Config]:
    document = from_hf(config).data
    return document, to_hf(document).data


NUMBERS = one_in(-1, 0, 1, 2, 3, 8, 64, 10**5, 10**18, 10**400, 0.0, 0.5, 1.5, -2.0, 1e308)
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | one_in("", "silu", "yarn", "llama3", "MM*E"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(one_in("type", "factor", "x"), inner, max_size=3),
    max_leaves=4,
)
SCALINGS = st.dictionaries(
    one_in("rope_type", "type", "factor", "original_max_position_embeddings", "beta_fast", "mscale", "mscale_all_dim"),
    NUMBERS | one_in("yarn", "linear", "llama3"),
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_is_given_is_refused_or_comes_back(data: st.DataObject) -> None:
    model_type = data.draw(one_in(*ARCHITECTURES))
    names = one_in(*ARCHITECTURES[model_type].names, "rope_scaling", "unheard_of")
    config = data.draw(st.dictionaries(names, NUMBERS | ANYTHING, max_size=4))
    if data.draw(FLAGS):
        config["rope_scaling"] = data.draw(SCALINGS)
    try:
        document = from_hf({"model_type": model_type} | config).data
    except DocumentError:
        return
    assert to_hf(document).data["model_type"] == model_type


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_a_document_says_is_refused_or_written(data: st.DataObject) -> None:
    preset = data.draw(one_in("llama-3.1-8b", "deepseek-v3", "nemotron-h-8b", "t5-base", "gpt2-124m", "gpt-oss-20b"))
    document = Document.load(preset)
    paths = one_in(*sorted(SHAPING.union(*(one.fields for one in ARCHITECTURES.values()))))
    for path, value in data.draw(st.dictionaries(paths, NUMBERS | ANYTHING, max_size=3)).items():
        document.set(path, value)
    try:
        written = to_hf(document.data)
    except DocumentError:
        return
    assert written.data["model_type"] in ARCHITECTURES


# --- What is said of the classes of transformers and of Megatron-Core


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_is_left_out_is_what_transformers_takes(model_type: str) -> None:
    cls = CONFIG_MAPPING[model_type]
    theirs = {field.name: field.default for field in dataclasses.fields(cls)} | {"rope_theta": cls.default_theta}
    ours = ARCHITECTURES[model_type].names
    unset = {"bos_token_id", "eos_token_id", "pad_token_id", "time_step_limit"}  # left out of the document too
    differing = {
        name: (known.default, theirs[name])
        for name, known in ours.items()
        if name in theirs and name not in unset and known.default != theirs[name]
    }
    assert not differing


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_field_of_the_class_is_known(model_type: str) -> None:
    document = from_hf(saved({"model_type": model_type} | SMALLEST.get(model_type, {}))).data
    assert to_hf(document).data["model_type"] == model_type


SMALLEST: dict[str, Config] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "deepseek_v3": {"num_mtp_layers": 0},
}


def test_nothing_that_shapes_a_model_is_passed_over() -> None:
    """Each field of a transformer is mapped, refused, or one of these, which do not change what a model is."""
    of_how_it_runs = re.compile(
        "|".join(
            (
                "(tensor|pipeline|virtual_pipeline|context|expert|expert_tensor|sequence)_.*(parallel|weight).*",
                "(cpu_offloading|tp_comm|cuda_graph|fp8|fp4|recompute|inference|overlap|cross_entropy|offload)_.*",
                "(moe_hybridep|moe_ncclep|moe_deepep|moe_paged_stash|moe_flex|gtp|expert_gtp|delta_offload)_.*",
                "(batch_p2p|kitchen|wgrad|persist|memory_efficient|masked_softmax|distribute|deallocate)_.*",
                "(use_kitchen|use_te|use_grouped_gemm|use_fused|use_ring|use_transformer_engine|symmetric|nccl).*",
                "(dsa|linear|mup|mamba|yarn|cuda)_.*|.*_cuda_graph(_.*)?|fp8|fp4|hybrid_context.*|hierarchical.*",
                ".*(_fusion|_func|_init_method(_std)?|_comm_type|_dtype|_backend|_rng_tracker|_logging|_layer_norm)",
                "init_method(_std)?|.*initializ.*|init_model_with_meta_device|(fp|bf)16|enable_autocast|.*in_bf16",
                "timers|.*_pipeline_(stage|split|layout)|pipeline_.*|variable_seq_lengths|num_microbatches.*",
                "defer.*|delay.*|ep_overlap.*|microbatch.*|mtp_(standalone|detach_heads|loss.*|hybrid_.*)",
                "barrier.*|deterministic_mode|flash.*|fp32_residual_connection|.*_dropout|.*_in_fp32",
                "qk_clip.*|log_max.*|test_mode|calculate_per_token_loss|apply_query_key_layer_scaling",
                "disable.*|first_last.*|high_priority.*|tp_only.*|activation_offload_fraction|min_offloaded.*",
                "fine_grained.*|config_logger_dir|batch_invariant_mode|clone_scatter.*|fused_(single|residual).*",
                "external_.*|mlp_chunks.*|hetereogenous_.*|quant_recipe|transformer_impl|is_hybrid_model",
                "max_seqlen.*|_cpu_offloading_context|.*glu_interleave_size|use_(cpu|mamba|inference).*|cp_comm.*",
                "moe_(aux_loss_coeff|z_loss_coeff|input_jitter_eps|token_d.*|enable_deepep|permute.*|pad_.*|per_.*)",
                "moe_(layer_recompute|router_(fusion|padding.*|bias_update.*|load.*|dtype|quantile.*)|single.*)",
                "moe_(enable_routing_replay|grouped_gemm|shared_expert_overlap|ffn_hidden_size|router_topk)",
                "mtp_num.*|num_(layers|attention_heads|query_groups)|(hidden|ffn_hidden)_size|kv_channels",
                "layernorm_epsilon|window_attn_skip_freq|window_size|recompute.*|cache_mla.*|mla_down.*",
                "(q|kv)_lora_rank|qk_.*head_dim|v_head_dim|rope_type|rotary_.*|original_max.*|beta.*|mscale.*",
                "attention_backend|activation_func_fp8_input_store|cpu_offloading|moe_paged_stash",
            )
        )
    )
    names = {field.name for cls in (TransformerConfig, MLATransformerConfig) for field in dataclasses.fields(cls)}
    shaping = {path.removeprefix("transformer.") for path in SHAPING}
    assert not {name for name in names - shaping if not of_how_it_runs.fullmatch(name)}
    tables = [shipped(one.target) for one in ARCHITECTURES.values()]
    top = {name for table in tables if table for name in table.fields}
    assert shaping <= names | top


def test_yarn_has_what_megatron_reads_and_does_not_declare() -> None:
    read = set(re.findall(r'"(yarn_\w+)"', inspect.getsource(gpt_model)))
    ours = {field.name for field in dataclasses.fields(YarnTransformerConfig)}
    theirs = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert read
    assert read == ours - theirs, "megatron-core declares them now: take YarnTransformerConfig away"


# --- What is refused

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("model_type", "fields", "paths"),
    [
        ("llama", {"num_hidden_layers": "many"}, ["num_hidden_layers"]),
        ("llama", {"num_hidden_layers": 0}, ["num_hidden_layers"]),
        ("gpt_oss", {"num_hidden_layers": 10**12}, ["num_hidden_layers"]),
        ("llama", {"num_hidden_layers": True, "rms_norm_eps": "x"}, ["num_hidden_layers", "rms_norm_eps"]),
        ("llama", {"hidden_size": 9, "num_attention_heads": 2}, ["num_attention_heads"]),
        ("llama", {"attention_bias": True}, ["attention_bias"]),
        ("llama", {"hidden_act": "gelu_10"}, ["hidden_act"]),
        ("llama", {"torch_dtype": "int8"}, ["torch_dtype"]),
        ("llama", {"rope_theta": 10000.5}, ["rope_theta"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_scaling.type"]),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling.factor"]),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2, "x": 1}}, ["rope_scaling.x"]),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, ["rope_parameters.rope_type"]),
        ("llama", {"rope_parameters": {"rope_type": "lama3"}}, ["rope_parameters.rope_type"]),
        (
            "llama",
            {"rope_scaling": LLAMA3 | {"rope_type": "llama3", "low_freq_factor": 2.0, "high_freq_factor": 8.0}},
            ["rope_scaling.high_freq_factor", "rope_scaling.low_freq_factor"],
        ),
        ("llama", {"rope_scaling": YARN | {"attention_factor": 2.0}}, ["rope_scaling.attention_factor"]),
        ("llama", {"rope_scaling": YARN | {"truncate": 1}}, ["rope_scaling.truncate"]),
        ("llama", {"attn_logit_softcapping": 50.0, "hiden_size": 8}, ["attn_logit_softcapping", "hiden_size"]),
        ("llama", {"vocab_size": 100, "bos_token_id": 100}, ["bos_token_id"]),
        ("gpt2", {"embd_pdrop": 0.2}, ["embd_pdrop"]),
        ("gpt2", {"n_embd": 8, "hidden_size": 16}, ["hidden_size"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights"]),
        (
            "qwen2",
            {"num_hidden_layers": 2, "use_sliding_window": True, "layer_types": ["x"]},
            ["layer_types", "layer_types[0]"],
        ),
        ("qwen2", {"layer_types": ["sliding_attention"] * 32}, ["layer_types"]),
        ("qwen3", {"attention_bias": True}, ["attention_bias"]),
        ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise"]),
        ("mixtral", {"num_experts_per_tok": 1}, ["num_experts_per_tok"]),
        ("qwen3_moe", {"decoder_sparse_step": 99}, ["decoder_sparse_step"]),
        ("gpt_oss", {"swiglu_alpha": 1.0, "attention_bias": False}, ["attention_bias", "swiglu_alpha"]),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}},
            ["rope_scaling.type"],
        ),
        ("gemma", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("gemma", {"hidden_activation": "gelu_11"}, ["hidden_activation"]),
        ("gemma2", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "model_type"]),
        ("gemma3", {}, ["model_type"]),
        ("gemma3_text", {}, ["model_type"]),
        (
            "deepseek_v2",
            {"num_experts_per_tok": 6, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3},
            ["topk_method"],
        ),
        ("deepseek_v2", {}, ["num_experts_per_tok"]),
        ("deepseek_v3", {"rms_norm_eps": 1e-5, "rope_interleave": False}, ["rms_norm_eps", "rope_interleave"]),
        ("deepseek_v3", {"topk_group": 2}, ["topk_group"]),
        ("deepseek_v3", {"norm_topk_prob": False}, ["norm_topk_prob"]),
        ("deepseek_v3", {"num_key_value_heads": 1}, ["num_key_value_heads"]),
        ("deepseek_v3", {"rope_scaling": YARN | {"mscale_all_dim": 1.0}}, ["rope_scaling.mscale_all_dim"]),
        ("mamba2", {"layer_norm_epsilon": 1e-6, "conv_kernel": 3}, ["conv_kernel", "layer_norm_epsilon"]),
        ("mamba2", {"time_step_limit": [0.1, 1.0], "num_heads": 3}, ["num_heads", "time_step_limit"]),
        ("nemotron_h", {"hybrid_override_pattern": "M-X"}, ["hybrid_override_pattern"]),
        ("nemotron_h", {"hybrid_override_pattern": "M-", "tie_word_embeddings": True}, ["tie_word_embeddings"]),
        ("nemotron_h", {"layers_block_type": ["mamba", "moe", "x"]}, ["layers_block_type[2]"]),
        ("nemotron_h", {"hybrid_override_pattern": "M-", "num_hidden_layers": 3}, ["num_hidden_layers"]),
        ("nemotron_h", {"hybrid_override_pattern": "M", "num_nextn_predict_layers": 1}, ["num_nextn_predict_layers"]),
        (
            "t5",
            {"feed_forward_proj": "gated-tanh", "initializer_factor": 2.0},
            ["feed_forward_proj", "initializer_factor"],
        ),
    ],
)
def test_what_a_document_cannot_say_is_refused_by_name(model_type: str, fields: Config, paths: list[str]) -> None:
    with pytest.raises(DocumentError) as error:
        from_hf({"model_type": model_type} | fields)
    assert sorted(problem.path for problem in error.value.problems) == [f"$.{path}" for path in paths]


@pytest.mark.parametrize(
    ("preset", "override", "path"),
    [
        ("llama-3.1-8b", "transformer.activation_func_clamp_value=7.0", "activation_func_clamp_value"),
        ("llama-3.1-8b", "transformer.layernorm_zero_centered_gamma=true", "layernorm_zero_centered_gamma"),
        ("llama-3.1-8b", "transformer.mtp_num_layers=1", "mtp_num_layers"),
        ("llama-3.1-8b", "transformer.softmax_scale=1.0", "softmax_scale"),
        ("llama-3.1-8b", "transformer.softmax_type=learnable", "softmax_type"),
        ("llama-3.1-8b", "transformer.use_mup=true", "use_mup"),
        ("llama-3.1-8b", "transformer.activation_func=torch.nn.functional.elu", "activation_func"),
        ("llama-3.1-8b", "transformer.params_dtype=torch.float64", "params_dtype"),
        ("gpt2-124m", "transformer.window_size=[3,0]", "window_size"),
        ("deepseek-v3", "transformer.moe_router_group_topk=2", "moe_router_group_topk"),
        ("nemotron-h-8b", "transformer.layernorm_epsilon=1e-6", "layernorm_epsilon"),
        ("t5-base", "transformer.softmax_scale=null", "softmax_scale"),
        ("t5-base", "transformer.attention_dropout=0.0", "attention_dropout"),
    ],
)
def test_what_config_json_cannot_say_is_refused_by_path(preset: str, override: str, path: str) -> None:
    document = Document.load(preset, ["transformer.bf16=false", override])
    with pytest.raises(DocumentError) as error:
        to_hf(document.data)
    assert f"$.transformer.{path}" in [problem.path for problem in error.value.problems]


def test_a_configuration_that_was_made_is_written_too() -> None:
    """It says what its document leaves to be derived: channels, groups, scales, initialisers."""
    for name in ("gemma-2b", "Qwen1.5-MoE-A2.7B", "gpt-oss-20b", "Llama-3.2-1B", "t5-base"):
        (file,) = (file for stem, file in PUBLISHED.items() if stem.endswith(name))
        document = from_hf(load_config_json(str(file)).data).data
        config = Document(document).config()
        assert isinstance(config, LanguageModelConfig)
        config.finalize()
        assert meaning(to_hf(config.as_dict()).data) == meaning(to_hf(document).data)


@pytest.mark.parametrize(
    ("preset", "model_type"),
    [
        ("gpt2-124m", "gpt2"),
        ("llama-3.1-405b", "llama"),
        ("deepseek-v3", "deepseek_v3"),
        ("mamba2-2.7b", "mamba2"),
        ("nemotron-h-8b", "nemotron_h"),
        ("t5-11b", "t5"),
    ],
)
def test_presets_are_models_of_transformers(preset: str, model_type: str) -> None:
    written = to_hf(Document.load(preset).data).data
    assert written["model_type"] == model_type
    assert made(written)


def test_a_document_says_which_of_several_architectures_it_is() -> None:
    plain = {"sliding_window": None, "num_hidden_layers": 2}
    documents = {name: from_hf({"model_type": name} | plain).data for name in ("llama", "mistral", "phi3")}
    assert {name: to_hf(data).data["model_type"] for name, data in documents.items()} == {
        name: name for name in documents
    }
    assert "extra_checkpoint_metadata" not in documents["llama"]
    data = documents["mistral"] | {"extra_checkpoint_metadata": {"hf_model_type": "qwen2"}}
    with pytest.raises(DocumentError, match="add_qkv_bias"):
        to_hf(data)
    with pytest.raises(DocumentError, match="'lama' is not known"):
        to_hf(data | {"extra_checkpoint_metadata": {"hf_model_type": "lama"}})


# --- The command line


@pytest.fixture
def bridge(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command; returns its exit code, and what it said on stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        return int(leaving.value.code or 0), told.out, told.err

    return run


Run = Callable[..., tuple[int, str, str]]
LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}


def written(folder: Path, config: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(config, indent=1))
    return file


def test_from_a_file_or_folder_to_yaml_json_or_a_file(
    bridge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, LLAMA | {"_name_or_path": "one/model", "quantization_config": {}})
    code, yaml, notes = bridge("from-hf", file)
    assert (code, notes) == (
        0,
        f"{file}: note: $.quantization_config is left out: it is about how published weights are stored\n",
    )
    assert bridge("from-hf", tmp_path) == (code, yaml, notes)
    monkeypatch.setattr("sys.stdin", file.open())
    assert bridge("from-hf", "-") == (code, yaml, notes.replace(str(file), "-"))
    assert f"did you mean {str(file)!r}" in bridge("from-hf", tmp_path / "confg.json")[2]
    _, text, _ = bridge("from-hf", file, "--json", "--model-id", "another/model")
    assert json.loads(text)["hf_model_id"] == "another/model"
    for name in ("made.yaml", "made.json"):
        assert bridge("from-hf", file, "-o", tmp_path / name)[:2] == (0, "")
        assert Document.load(tmp_path / name).data == json.loads(text) | {"hf_model_id": "one/model"}
    code, back, _ = bridge("to-hf", tmp_path / "made.yaml")
    assert json.loads(back) == to_hf(json.loads(text)).data | {"_name_or_path": "one/model"}
    to_folder = ("to-hf", tmp_path / "made.yaml", "vocab_size=64", "-o", tmp_path)
    assert bridge(*to_folder)[::2] == (
        1,
        f"{file}: there is such a file: give --force to overwrite it, or another name\n",
    )
    assert bridge(*to_folder, "--force") == (0, "", "")
    assert json.loads(file.read_text()) == json.loads(back) | {"vocab_size": 64}


def test_a_file_is_overwritten_on_demand_and_a_schema_is_told_of(bridge: Run, tmp_path: Path) -> None:
    file, made = written(tmp_path, LLAMA), tmp_path / "made.yaml"
    _, _, told = bridge("from-hf", file, "-o", made)
    assert told.startswith(f"{tmp_path / 'GPTModelConfig.schema.json'}: the JSON Schema that made.yaml names")
    made.write_text("mine\n")
    code, _, told = bridge("from-hf", file, "-o", made)
    assert (code, made.read_text()) == (1, "mine\n")
    assert "give --force to overwrite it" in told
    assert bridge("from-hf", file, "-o", made, "--force") == (0, "", "")
    assert Document.load(made).data["vocab_size"] == 32000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_llama_config", True),
        ("unsloth_fixed", True),
        ("unsloth_version", "2025.1.1"),
        ("transformers.js_config", {"dtype": "q4"}),
        ("use_flashattn", True),
        ("_flash_attn_2_enabled", True),
        ("shared_expert_intermediate_size", 0),
        ("pretraining_tp", 1),
        ("residual_multiplier", 1.0),
        ("rope_interleaved", False),
        ("extra", []),
        ("layer_types", ["full_attention", "full_attention"]),
    ],
)
def test_a_statement_that_says_nothing_of_the_model_is_left_out_with_a_note(name: str, value: Any) -> None:
    given = {"model_type": "mixtral", "num_hidden_layers": 2}
    plain, found = from_hf(given), from_hf(given | {name: value})
    assert found.data == plain.data
    assert any(name in note and "is left out" in note for note in found.notes)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe"])
def test_what_is_so_of_an_architecture_may_be_said(model_type: str) -> None:
    assert from_hf({"model_type": model_type, "use_qk_norm": True}).data == from_hf({"model_type": model_type}).data
    with pytest.raises(DocumentError, match="use_qk_norm: queries and keys of this architecture are normalised"):
        from_hf({"model_type": model_type, "use_qk_norm": False})


def test_a_dtype_as_torch_writes_it() -> None:
    for name in ("dtype", "torch_dtype"):
        assert from_hf(LLAMA | {name: "torch.bfloat16"}).data["transformer"]["bf16"] is True


@pytest.mark.parametrize(
    ("name", "value"), [("shared_expert_intermediate_size", 8), ("pretraining_tp", 2), ("rope_interleaved", True)]
)
def test_a_statement_that_may_say_something_is_refused(name: str, value: Any) -> None:
    with pytest.raises(DocumentError, match=f"{name}: unknown to Bridge"):
        from_hf({"model_type": "mixtral", name: value})


def test_the_head_of_a_classifier_and_long_sequences_are_told_of() -> None:
    given = LLAMA | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}
    (note,) = from_hf(given).notes
    assert "has a head for SequenceClassification, of 3 labels, in place of the output layer" in note
    (note,) = from_hf(LLAMA | {"max_position_embeddings": 131072}).notes
    assert note.startswith("seq_length is 131,072")
    assert not from_hf(LLAMA | {"architectures": ["LlamaForCausalLM"], "num_labels": 2}).notes


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"model_type": "llama", "num_key_value_heads": 3}, "$.num_key_value_heads"),
        ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 8}, "$.num_experts_per_tok"),
    ],
)
def test_a_model_that_cannot_run_is_refused_at_the_field_that_says_so(given: dict[str, Any], path: str) -> None:
    with pytest.raises(DocumentError) as error:
        from_hf(
            {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "num_hidden_layers": 2, **given}
        )
    assert [problem.path for problem in error.value.problems] == [path]


def test_a_language_model_inside_another_is_told_of() -> None:
    with pytest.raises(DocumentError, match=r"\$\.text_config: the language model is in here, a llama: save this part"):
        from_hf({"model_type": "llava", "text_config": LLAMA, "vision_config": {}})


def test_a_hint_is_no_way_into_a_second_refusal() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attn_factor": 0.878}
    with pytest.raises(DocumentError, match="attn_factor: Megatron-Core has no such factor") as refused:
        from_hf({"model_type": "qwen3", "rope_scaling": yarn})
    assert "did you mean" not in str(refused.value)
    assert from_hf({"model_type": "qwen3", "rope_scaling": yarn | {"attn_factor": 1.0}})
    with pytest.raises(DocumentError) as refused:
        from_hf(LLAMA | {"vocab_size": 9, "vocab_sizes": 8})
    assert "did you mean 'vocab_size'" not in str(refused.value)


def test_infinity_as_python_writes_it(bridge: Run, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "mamba2", "time_step_limit": [0.0, Infinity], "task_specific_params": "Infinity"}')
    assert bridge("from-hf", file)[0] == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"model_type": "llama",', "config.json:1:24: $: "),
        ('{"model_type": "' + 10**5 * '\\\\"', "config.json:1:"),
        ('{"model_type": "llama", "a.b": 1}', "config.json:1:25: $["),
        ("[]", "config.json: $: expected a mapping at the top"),
        ('{"num_hidden_layers": 2}', "config.json:1:1: $.model_type: missing"),
        ('{"model_type": 3}', "config.json:1:2: $.model_type: expected text, got 3"),
        ('{"model_type": "lama"}', "'lama' is not known to Bridge; did you mean 'llama'?"),
        ('{"model_type": "llama",\n "rope_scaling": {"type": "dynamic"}}', "config.json:2:19: $.rope_scaling.type: "),
        ('{"model_type": "llama", "num_hiden_layers": 2}', "did you mean 'num_hidden_layers'?"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(bridge: Run, tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    code, out, told = bridge("from-hf", file)
    assert (code, out) == (1, "")
    assert said in told


def test_a_config_json_is_a_json_file(bridge: Run, tmp_path: Path) -> None:
    code, out, told = bridge("to-hf", "gpt2-124m", "-o", tmp_path / "config.yaml")
    assert (code, out) == (1, "")
    assert told.endswith("config.yaml: give a .json file, or a folder to put config.json into\n")


def test_no_file_and_no_model_of_transformers(bridge: Run, tmp_path: Path) -> None:
    code, _, told = bridge("from-hf", tmp_path)
    assert code == 1
    assert told == f"{tmp_path / 'config.json'}: $: no such file, nor a folder with a config.json\n"
    code, out, told = bridge("to-hf", "mla-tiny")
    assert (code, out) == (1, "")
    assert "no architecture is the same model; the nearest is deepseek_v2" in told
    assert "$.transformer.num_moe_experts" in told


def test_neither_command_needs_torch_megatron_or_transformers(tmp_path: Path) -> None:
    file = written(tmp_path, LLAMA)
    document = tmp_path / "a.yaml"
    code = (
        "import sys; from bridge.config.cli import bridge\n"
        f"for line in (['from-hf', {str(file)!r}, '-o', {str(document)!r}], ['to-hf', {str(document)!r}]):\n"
        "    bridge(line, standalone_mode=False)\n"
        "print({'torch', 'megatron', 'transformers', 'numpy'} & {name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
