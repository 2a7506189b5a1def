"""Test cases for each Hugging Face architecture: strategies that draw a config.json, and small models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from huggingface_meaning import Config
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

# --- Strategies of config.json files


def one_of(*values: Any) -> SearchStrategy[Any]:
    return st.sampled_from(values)


SIZES = st.integers(1, 512)
SHARES = st.floats(0, 1, width=16)
TOKENS = st.none() | st.integers(0, 15)
ACTIVATIONS = one_of("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu")
FLAGS = st.booleans()
FACTORS = st.integers(1, 64) | st.floats(1, 64, width=16)
EPSILONS = one_of(1e-8, 1e-6, 1e-5, 1e-3)
COMMON = {
    "vocab_size": st.integers(60000, 300000),  # larger than every default token of the classes
    "initializer_range": SHARES,
    "tie_word_embeddings": FLAGS,
    "bos_token_id": TOKENS,
    "eos_token_id": TOKENS | st.lists(st.integers(0, 15), min_size=1, max_size=3),
    "pad_token_id": TOKENS,
    "dtype": one_of(None, "float32", "bfloat16", "float16"),
    "use_cache": FLAGS,
}
DECODER = COMMON | {
    "max_position_embeddings": st.integers(9000, 100000),
    "intermediate_size": SIZES,
    "num_key_value_heads": one_of(1, 2),
    "attention_dropout": SHARES,
    "rms_norm_eps": EPSILONS,
    "hidden_act": ACTIVATIONS,
}


@st.composite
def ropes(draw: DrawFn, kinds: tuple[str, ...]) -> Config:
    """Draw ``rope_theta`` and ``rope_scaling`` as version 4 of transformers writes them; both are optional."""
    config: Config = draw(st.fixed_dictionaries({}, optional={"rope_theta": st.integers(1, 10**7).map(float)}))
    kind = draw(one_of(None, "default", *kinds))
    scaling: Config = {"rope_type": kind}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind == "yarn":
        scaling |= draw(
            st.fixed_dictionaries(
                {"original_max_position_embeddings": st.integers(1, 8192)},
                optional={"beta_fast": one_of(32, 16.0), "beta_slow": one_of(1, 2.0), "truncate": FLAGS},
            )
        )
        if draw(FLAGS):
            scaling |= {"mscale": draw(one_of(0.5, 1)), "mscale_all_dim": draw(one_of(0.5, 1))}
    if kind in ("linear", "llama3", "yarn"):
        scaling["factor"] = draw(FACTORS)
    return config | ({} if kind is None else {"rope_scaling": scaling})


@st.composite
def windows(draw: DrawFn, layers: int) -> Config:
    """Draw the sliding-window fields of Qwen2 and Qwen3."""
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
    return st.lists(one_of("sliding_attention", "full_attention"), min_size=layers, max_size=layers)


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
    """Draw the config of a decoder similar to Llama."""
    heads, layers = draw(one_of(2, 4, 8)), draw(st.integers(1, 6))
    shape = {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": heads * draw(one_of(2, 8, 16)),
    }
    if "head_dim" not in without and draw(FLAGS):
        shape["head_dim"] = draw(one_of(4, 8))
    optional = {name: strategy for name, strategy in DECODER.items() if name not in without}
    return shape | draw(fields({}, optional)) | draw(ropes(kinds)) | draw(more(layers))


def expert_fields(number: str, width: bool = True) -> dict[str, SearchStrategy[Any]]:
    wide = {"moe_intermediate_size": SIZES} if width else {}
    return {number: st.integers(8, 16), "num_experts_per_tok": st.integers(2, 8), "router_aux_loss_coef": SHARES} | wide


def expert_layers(layers: int) -> SearchStrategy[Config]:
    """Return a strategy for the layers with experts, which include the last one."""
    return st.fixed_dictionaries(
        {},
        optional={
            "decoder_sparse_step": one_of(*(step for step in (1, 2, 3) if layers % step == 0)),
            "mlp_only_layers": st.lists(st.integers(0, 6).filter(lambda layer: layer != layers - 1), max_size=3),
        },
    )


def merge(*parts: SearchStrategy[Config]) -> SearchStrategy[Config]:
    return st.tuples(*parts).map(lambda found: {name: value for part in found for name, value in part.items()})


@st.composite
def gpt2s(draw: DrawFn) -> Config:
    heads = draw(one_of(1, 2, 4))
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
    return config | draw(fields({}, {"hidden_act": one_of("gelu", "gelu_pytorch_tanh", "silu", "relu")}))


@st.composite
def phi3s(draw: DrawFn) -> Config:
    dropout = draw(SHARES)
    config: Config = draw(decoders("phi3", without=("head_dim",), kinds=()))
    more = draw(fields({}, {"sliding_window": st.none() | SIZES, "partial_rotary_factor": one_of(0.25, 0.5, 1.0)}))
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
        "routed_scaling_factor": one_of(1.0, 2.5, 16.0),
        "attention_bias": st.just(False),
        "pretraining_tp": st.just(1),
        "ep_size": st.just(1),
        "moe_layer_freq": st.just(1),
    }
    config |= draw(fields({"first_k_dense_replace": st.integers(0, layers - 1)}, optional))
    config |= {
        "num_key_value_heads": config["num_attention_heads"],
        "n_routed_experts": 16,
        "num_experts_per_tok": draw(one_of(2, 4, 6, 8)),
    }
    chosen = config["num_experts_per_tok"]
    if model_type == "deepseek_v2":
        groups = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": chosen}
        return config | (groups if draw(FLAGS) else {"topk_method": "greedy", "n_group": 1, "topk_group": 1})
    config |= draw(one_of({"n_group": 1, "topk_group": 1}, {"n_group": 8, "topk_group": chosen // 2}))
    return config | draw(fields({}, {"num_nextn_predict_layers": st.integers(0, 2), "norm_topk_prob": st.just(True)}))


@st.composite
def mamba2s(draw: DrawFn) -> Config:
    heads, channels = draw(one_of(4, 8)), draw(one_of(4, 8))
    optional = COMMON | {
        "state_size": SIZES,
        "residual_in_fp32": FLAGS,
        "num_hidden_layers": SIZES,
        "time_step_limit": st.just([0.0, {"__float__": "Infinity"}]),
        "norm_before_gate": FLAGS,
    }
    expand = draw(one_of(1, 2, 4))
    shape = {"num_heads": heads, "head_dim": channels, "expand": expand, "hidden_size": heads * channels // expand}
    return {"model_type": "mamba2", "n_groups": draw(one_of(1, 2, 4))} | shape | draw(fields({}, optional))


@st.composite
def nemotrons(draw: DrawFn) -> Config:
    pattern = draw(st.text("M*-E", min_size=1, max_size=6))
    optional = COMMON | {
        "tie_word_embeddings": st.just(False),
        "max_position_embeddings": SIZES,
        "hidden_size": SIZES.map(lambda size: 8 * size),
        "intermediate_size": SIZES,
        "num_key_value_heads": one_of(1, 2),
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
        "routed_scaling_factor": one_of(1.0, 2.5),
    }
    config = {"model_type": "nemotron_h", "num_attention_heads": 8} | draw(fields({}, optional))
    names = {"M": one_of("mamba", "linear_attention"), "*": one_of("attention", "full_attention")}
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
        "feed_forward_proj": one_of("relu", "gelu", "gelu_new", "gated-gelu", "gated-silu", "gated-relu"),
        "tie_word_embeddings": FLAGS,
        "decoder_start_token_id": TOKENS,
    }
    return {"model_type": "t5"} | draw(fields({}, optional))


FAMILIES: dict[str, SearchStrategy[Config]] = {
    "gpt2": gpt2s(),
    "llama": one_of({}, {"attention_bias": True, "mlp_bias": True}).flatmap(
        lambda biases: decoders("llama").map(lambda config: config | biases)
    ),
    "mistral": decoders("mistral", lambda layers: fields({}, {"sliding_window": st.none() | SIZES})),
    "qwen2": decoders("qwen2", windows, without=("head_dim",)),
    "qwen3": decoders("qwen3", windows),
    "phi3": phi3s(),
    "gemma": gemmas(),
    "mixtral": decoders(
        "mixtral",
        lambda layers: fields(
            {}, {"sliding_window": st.none() | SIZES} | expert_fields("num_local_experts", width=False)
        ),
    ),
    "qwen2_moe": decoders(
        "qwen2_moe",
        lambda layers: merge(
            fields({}, expert_fields("num_experts") | {"norm_topk_prob": FLAGS, "qkv_bias": FLAGS}),
            fields({}, {"shared_expert_intermediate_size": SIZES}),
            expert_layers(layers),
            windows(layers),
        ),
        without=("head_dim",),
    ),
    "qwen3_moe": decoders(
        "qwen3_moe",
        lambda layers: merge(
            fields({}, expert_fields("num_experts") | {"norm_topk_prob": FLAGS}),
            expert_layers(layers),
            fields({}, {"use_sliding_window": FLAGS, "sliding_window": SIZES}),
        ),
    ),
    "gpt_oss": decoders(
        "gpt_oss",
        lambda layers: fields(
            {},
            expert_fields("num_local_experts", width=False)
            | {"sliding_window": SIZES, "layer_types": layer_types(layers), "swiglu_limit": one_of(7.0, 3.5)},
        ),
        without=("hidden_act",),
    ),
    "deepseek_v2": deepseeks("deepseek_v2"),
    "deepseek_v3": deepseeks("deepseek_v3"),
    "mamba2": mamba2s(),
    "nemotron_h": nemotrons(),
    "t5": t5s(),
}

# --- Small models

TOKENIZER = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32"}
SMALL = TOKENIZER | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Far from the defaults, so that an ignored value changes the logits.
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-2,
}
LLAMA_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 1.0, "beta_slow": 0.1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = SMALL | {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "layer_norm_epsilon": 1e-2}
STATES = TOKENIZER | {"hidden_size": 32, "n_groups": 2, "chunk_size": 8, "conv_kernel": 4}
HYBRID = STATES | {
    "model_type": "nemotron_h",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "mamba_num_heads": 12,
    "mamba_head_dim": 8,
    "ssm_state_size": 16,
    "max_position_embeddings": 64,
}
MODELS: dict[str, Config] = {
    "gpt2": TOKENIZER | {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt2, other MLP width, untied": (
        TOKENIZER
        | {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 40}
        | {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}
    ),
    "llama": SMALL | {"model_type": "llama"},
    "llama, biases": SMALL | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama 3.1": (
        SMALL | {"model_type": "llama", "head_dim": 64, "rope_theta": 500000.0, "rope_scaling": LLAMA_SCALING}
    ),
    "llama 3.2, tied": SMALL | {"model_type": "llama", "tie_word_embeddings": True},
    "mistral, windows": SMALL | {"model_type": "mistral", "sliding_window": 8},
    "mixtral": SMALL | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": SMALL | {"model_type": "qwen2"},
    "qwen2, windows in later layers": (
        SMALL | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "qwen2, YaRN": SMALL | {"model_type": "qwen2", "rope_scaling": YARN},
    "qwen2_moe": (
        SMALL | EXPERTS | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 20, "mlp_only_layers": [0]}
    ),
    "qwen3": SMALL | {"model_type": "qwen3", "head_dim": 16},
    "qwen3_moe": SMALL | EXPERTS | {"model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": True},
    "qwen3_moe, as the router has it": (
        SMALL | EXPERTS | {"model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": False}
    ),
    "deepseek_v2, lite": (
        LATENT
        | {
            "model_type": "deepseek_v2",
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.0,
            "topk_method": "greedy",
            "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        }
    ),
    "deepseek_v2, groups": (
        LATENT
        | {
            "model_type": "deepseek_v2",
            "n_shared_experts": 2,
            "routed_scaling_factor": 16.0,
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
        }
    ),
    "deepseek_v3": (
        LATENT
        | {
            "model_type": "deepseek_v3",
            "num_nextn_predict_layers": 0,  # transformers lacks multi-token prediction
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        }
    ),
    "gemma": SMALL | {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16, "hidden_act": "gelu"},
    "phi3, windows": SMALL | {"model_type": "phi3", "sliding_window": 8},
    "phi3, half rotary": SMALL | {"model_type": "phi3", "hidden_size": 64, "partial_rotary_factor": 0.5},
    "gpt_oss": (
        SMALL
        | {
            "model_type": "gpt_oss",
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "swiglu_limit": 1.0,  # low enough to clip some activations
            "rope_scaling": YARN | {"truncate": False},
            "tie_word_embeddings": False,
        }
    ),
    "t5, 1.0": T5 | {"model_type": "t5", "feed_forward_proj": "relu"},
    "t5, 1.1": T5 | {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mamba2": (
        STATES
        | {"model_type": "mamba2", "num_heads": 16, "head_dim": 8, "expand": 4, "state_size": 16}
        | {"num_hidden_layers": 2}
    ),
    "nemotron_h": HYBRID | {"hybrid_override_pattern": "M-M*-"},
    "nemotron_h, experts": (
        HYBRID
        | {
            "hybrid_override_pattern": "ME*E-",
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 20,
            "routed_scaling_factor": 2.5,
        }
    ),
}
