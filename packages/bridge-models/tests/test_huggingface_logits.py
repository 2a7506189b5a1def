"""What `bridge from-hf` makes of a small model of each family computes what transformers' own class computes.

The weights are random, those of norms and biases too, and are carried over by name: the two differ in how they put them
together. Megatron fuses queries, keys and values, a group of heads after the other, and gate and up projections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bridge.config import ModelConfig
from bridge.dist.cpu import cpu_runtime
from bridge.models.huggingface import from_hf

Weights = dict[str, torch.Tensor]
Carry = Callable[[Any, Weights], Weights]
"""Ours from those of transformers, and its config."""


@pytest.fixture(scope="module", autouse=True)
def _on_cpu(pg_collection: ProcessGroupCollection) -> Iterator[None]:
    with cpu_runtime():
        yield


# --- Weights


def under(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def renamed(weights: Weights, names: dict[str, str]) -> Weights:
    """Each module's weight, and its bias if it has one, under another name."""
    kinds = ("weight", "bias")
    return {
        f"{new}.{kind}": weights[f"{old}.{kind}"]
        for old, new in names.items()
        for kind in kinds
        if f"{old}.{kind}" in weights
    }


def fused(weights: Weights, parts: list[str], name: str, *, groups: int = 1) -> Weights:
    """Modules' weights and biases as one, of ``groups`` blocks that hold a share of each part."""
    return {
        f"{name}.{kind}": torch.cat(
            [weights[f"{part}.{kind}"].unflatten(0, (groups, -1)) for part in parts], dim=1
        ).flatten(0, 1)
        for kind in ("weight", "bias")
        if f"{parts[0]}.{kind}" in weights
    }


def split(weights: Weights, name: str, sizes: dict[str, int]) -> Weights:
    parts = weights[f"{name}.weight"].split(list(sizes.values()))
    return {f"{part}.weight": tensor for part, tensor in zip(sizes, parts, strict=True)}


def llama(config: Any, weights: Weights) -> Weights:
    """Llama and all that name their weights as it does."""
    found = renamed(
        weights,
        {
            "model.embed_tokens": "embedding.word_embeddings",
            "model.norm": "decoder.final_layernorm",
        },
    )
    if not config.tie_word_embeddings:
        found |= renamed(weights, {"lm_head": "output_layer"})
    for layer in range(config.num_hidden_layers):
        theirs = under(weights, f"model.layers.{layer}.")
        ours = (
            renamed(theirs, {"input_layernorm": "input_layernorm", "post_attention_layernorm": "pre_mlp_layernorm"})
            | prefixed("self_attention.", attention(config, under(theirs, "self_attn.")))
            | prefixed("mlp.", mlp(under(theirs, "mlp.")))
        )
        found |= prefixed(f"decoder.layers.{layer}.", ours)
    return found


def attention(config: Any, weights: Weights) -> Weights:
    if "kv_b_proj.weight" in weights:
        return latent_attention(weights)
    groups = config.num_key_value_heads
    if "qkv_proj.weight" in weights:
        channels = config.hidden_size // config.num_attention_heads
        sizes = {
            "q_proj": channels * config.num_attention_heads,
            "k_proj": channels * groups,
            "v_proj": channels * groups,
        }
        weights = weights | split(weights, "qkv_proj", sizes)
    found = fused(weights, ["q_proj", "k_proj", "v_proj"], "linear_qkv", groups=groups)
    found |= renamed(weights, {"o_proj": "linear_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"})
    if "sinks" in weights:
        found["core_attention.softmax_offset"] = weights["sinks"]
    return found


def latent_attention(weights: Weights) -> Weights:
    return renamed(
        weights,
        {
            "q_proj": "linear_q_proj",
            "q_a_proj": "linear_q_down_proj",
            "q_a_layernorm": "q_layernorm",
            "q_b_proj": "linear_q_up_proj",
            "kv_a_proj_with_mqa": "linear_kv_down_proj",
            "kv_a_layernorm": "kv_layernorm",
            "kv_b_proj": "linear_kv_up_proj",
            "o_proj": "linear_proj",
        },
    )


def mlp(weights: Weights) -> Weights:
    """A gated MLP, or experts with what stands beside them."""
    if not any(name.startswith("experts.") for name in weights):
        if "gate_proj.weight" in weights:
            found = fused(weights, ["gate_proj", "up_proj"], "linear_fc1")
        else:
            found = renamed(weights, {"gate_up_proj": "linear_fc1", "up_proj": "linear_fc1"})
        return found | renamed(weights, {"down_proj": "linear_fc2"})
    found = renamed(weights, {"gate": "router", "router": "router"})
    if "gate.e_score_correction_bias" in weights:
        found["router.expert_bias"] = weights["gate.e_score_correction_bias"]
    found |= prefixed("experts.", experts(under(weights, "experts.")))
    for name in ("shared_expert", "shared_experts"):
        if shared := under(weights, f"{name}."):
            found |= prefixed("shared_experts.", mlp(shared))
    if "shared_expert_gate.weight" in weights:
        found["shared_experts.gate_weight"] = weights["shared_expert_gate.weight"]
    return found


def experts(weights: Weights) -> Weights:
    """Each expert's matrices, which stand in one tensor."""
    names = {"gate_up_proj": "linear_fc1.weight", "up_proj": "linear_fc1.weight", "down_proj": "linear_fc2.weight"}
    if "gate_up_proj_bias" in weights:  # GPT-OSS: inputs before outputs, and a row of the gate, one of up, and so on
        names |= {"gate_up_proj_bias": "linear_fc1.bias", "down_proj_bias": "linear_fc2.bias"}
        weights = {name: tensor.transpose(-1, -2) if tensor.dim() == 3 else tensor for name, tensor in weights.items()}
        for name in ("gate_up_proj", "gate_up_proj_bias"):
            weights[name] = torch.cat([weights[name][:, 0::2], weights[name][:, 1::2]], dim=1)
    return {
        f"{ours}{expert}": tensor
        for theirs, ours in names.items()
        if theirs in weights
        for expert, tensor in enumerate(weights[theirs])
    }


def gpt2(config: Any, weights: Weights) -> Weights:
    found = renamed(
        weights,
        {
            "transformer.wte": "embedding.word_embeddings",
            "transformer.wpe": "embedding.position_embeddings",
            "transformer.ln_f": "decoder.final_layernorm",
        },
    )
    if not config.tie_word_embeddings:
        found |= renamed(weights, {"lm_head": "output_layer"})
    for layer in range(config.n_layer):
        theirs = {  # inputs stand before outputs
            name: tensor.T if tensor.dim() == 2 else tensor
            for name, tensor in under(weights, f"transformer.h.{layer}.").items()
        }
        for kind in ("weight", "bias"):
            for part, tensor in zip("qkv", theirs[f"attn.c_attn.{kind}"].chunk(3), strict=True):
                theirs[f"{part}.{kind}"] = tensor
        ours = fused(theirs, ["q", "k", "v"], "self_attention.linear_qkv", groups=config.n_head) | renamed(
            theirs,
            {
                "ln_1": "input_layernorm",
                "attn.c_proj": "self_attention.linear_proj",
                "ln_2": "pre_mlp_layernorm",
                "mlp.c_fc": "mlp.linear_fc1",
                "mlp.c_proj": "mlp.linear_fc2",
            },
        )
        found |= prefixed(f"decoder.layers.{layer}.", ours)
    return found


def mamba(config: Any, weights: Weights) -> Weights:
    """Mamba2 and Nemotron-H, whose layers have one part each."""
    weights = {name.replace("backbone.", "model."): tensor for name, tensor in weights.items()}
    found = renamed(weights, {"model.embeddings": "embedding.word_embeddings", "model.norm_f": "decoder.final_norm"})
    if not config.tie_word_embeddings:
        found |= renamed(weights, {"lm_head": "output_layer"})
    for layer in range(config.num_hidden_layers):
        theirs = under(weights, f"model.layers.{layer}.")
        mixer = under(theirs, "mixer.")
        if "in_proj.weight" in mixer:
            named = {name.replace("conv1d.", "conv1d_"): tensor for name, tensor in mixer.items()}
            ours = prefixed("mixer.", named) | renamed(theirs, {"norm": "norm"})
        elif "q_proj.weight" in mixer:
            ours = prefixed("self_attention.", attention(config, mixer)) | renamed(theirs, {"norm": "input_layernorm"})
        else:
            ours = prefixed("mlp.", mlp(mixer)) | renamed(theirs, {"norm": "pre_mlp_layernorm"})
        found |= prefixed(f"decoder.layers.{layer}.", ours)
    return found


def t5(config: Any, weights: Weights) -> Weights:
    found = renamed(weights, {"shared": "embedding.word_embeddings"})
    if not config.scale_decoder_outputs:  # transformers 5 ties the output layer all the same
        found |= renamed(weights, {"lm_head": "lm_head.output_layer"}) | renamed(weights, {"lm_head": "output_layer"})
    for stack, layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        theirs = under(weights, f"{stack}.")
        found |= renamed(
            weights,
            {
                f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias": f"{stack}_relative_pos_emb."
                "relative_attention_bias",
                f"{stack}.final_layer_norm": f"{stack}.final_layernorm",
            },
        )
        for layer in range(layers):
            ours = t5_layer(config, under(theirs, f"block.{layer}."))
            found |= prefixed(f"{stack}.layers.{layer}.", ours)
    if config.scale_decoder_outputs:  # a factor on the last norm's output, which Megatron's T5 has not
        found["decoder.final_layernorm.weight"] = found["decoder.final_layernorm.weight"] / math.sqrt(config.d_model)
    return found


def t5_layer(config: Any, weights: Weights) -> Weights:
    crosses = any("EncDecAttention" in name for name in weights)
    attends, crossing, feeds = "layer.0.SelfAttention", "layer.1.EncDecAttention", f"layer.{2 if crosses else 1}"
    fed = renamed(
        under(weights, f"{feeds}.DenseReluDense."),
        {"wi": "up_proj", "wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"},
    )
    found = (
        renamed(
            weights,
            {
                "layer.0.layer_norm": "input_layernorm",
                f"{attends}.o": "self_attention.linear_proj",
                f"{feeds}.layer_norm": "pre_mlp_layernorm",
            },
        )
        | fused(weights, [f"{attends}.{part}" for part in "qkv"], "self_attention.linear_qkv", groups=config.num_heads)
        | prefixed("mlp.", mlp(fed))
    )
    if crosses:
        found |= renamed(
            weights,
            {
                "layer.1.layer_norm": "pre_cross_attn_layernorm",
                f"{crossing}.q": "cross_attention.linear_q",
                f"{crossing}.o": "cross_attention.linear_proj",
            },
        ) | fused(
            weights, [f"{crossing}.{part}" for part in "kv"], "cross_attention.linear_kv", groups=config.num_heads
        )
    return found


# --- Models


WORDS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32"}
SMALL = WORDS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Far from all defaults, so that they show.
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
STATES = WORDS | {"hidden_size": 32, "n_groups": 2, "chunk_size": 8, "conv_kernel": 4}
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

MODELS: dict[str, tuple[dict[str, Any], Carry]] = {
    "gpt2": (WORDS | {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, gpt2),
    "gpt2, of other widths, untied": (
        WORDS
        | {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 40}
        | {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
        gpt2,
    ),
    "llama": (SMALL | {"model_type": "llama"}, llama),
    "llama, biases": (SMALL | {"model_type": "llama", "attention_bias": True, "mlp_bias": True}, llama),
    "llama 3.1": (
        SMALL | {"model_type": "llama", "head_dim": 64, "rope_theta": 500000.0, "rope_scaling": LLAMA_SCALING},
        llama,
    ),
    "llama 3.2, tied": (SMALL | {"model_type": "llama", "tie_word_embeddings": True}, llama),
    "mistral, windows": (SMALL | {"model_type": "mistral", "sliding_window": 8}, llama),
    "mixtral": (SMALL | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}, llama),
    "qwen2": (SMALL | {"model_type": "qwen2"}, llama),
    "qwen2, windows in later layers": (
        SMALL | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        llama,
    ),
    "qwen2, YaRN": (SMALL | {"model_type": "qwen2", "rope_scaling": YARN}, llama),
    "qwen2_moe": (
        SMALL | EXPERTS | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 20, "mlp_only_layers": [0]},
        llama,
    ),
    "qwen3": (SMALL | {"model_type": "qwen3", "head_dim": 16}, llama),
    "qwen3_moe": (SMALL | EXPERTS | {"model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": True}, llama),
    "qwen3_moe, as the router has it": (
        SMALL | EXPERTS | {"model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": False},
        llama,
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
        },
        llama,
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
        },
        llama,
    ),
    "deepseek_v3": (
        LATENT
        | {
            "model_type": "deepseek_v3",
            "num_nextn_predict_layers": 0,  # transformers has no such layer
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
        llama,
    ),
    "gemma": (SMALL | {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16, "hidden_act": "gelu"}, llama),
    "phi3, windows": (SMALL | {"model_type": "phi3", "sliding_window": 8}, llama),
    "phi3, half rotary": (SMALL | {"model_type": "phi3", "hidden_size": 64, "partial_rotary_factor": 0.5}, llama),
    "gpt_oss": (
        SMALL
        | {
            "model_type": "gpt_oss",
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "swiglu_limit": 1.0,  # cuts off some
            "rope_scaling": YARN | {"truncate": False},
            "tie_word_embeddings": False,
        },
        llama,
    ),
    "t5, 1.0": (T5 | {"model_type": "t5", "feed_forward_proj": "relu"}, t5),
    "t5, 1.1": (T5 | {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, t5),
    "mamba2": (
        STATES
        | {"model_type": "mamba2", "num_heads": 16, "head_dim": 8, "expand": 4, "state_size": 16}
        | {"num_hidden_layers": 2},
        mamba,
    ),
    "nemotron_h": (HYBRID | {"hybrid_override_pattern": "M-M*-"}, mamba),
    "nemotron_h, experts": (
        HYBRID
        | {
            "hybrid_override_pattern": "ME*E-",
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 20,
            "routed_scaling_factor": 2.5,
        },
        mamba,
    ),
}


def theirs(config: dict[str, Any]) -> Any:
    """The model of transformers, whose every parameter matters."""
    generator = torch.Generator().manual_seed(5)
    read = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    kind = AutoModelForSeq2SeqLM if read.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(read, attn_implementation="eager").eval()
    biases_of_routers = [(name, buffer) for name, buffer in model.named_buffers() if "correction" in name]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *biases_of_routers]:
            drawn = torch.randn(tensor.shape, generator=generator)
            if "norm" in name or ".ln_" in name:
                tensor.add_(0.3 * drawn)
            elif tensor.dim() == 1 or name.endswith("_bias"):
                tensor.copy_(0.3 * drawn)
            else:
                tensor.copy_(drawn / math.sqrt(tensor.shape[-1]))
    return model


def ours(config: dict[str, Any], pg_collection: ProcessGroupCollection) -> Any:
    """The model that Bridge builds from the same config.json."""
    read: Any = ModelConfig.from_dict(from_hf(config).data)
    read.transformer.use_cpu_initialization = True
    read.finalize()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return read.get_builder_cls()(read).build_model(pg_collection).eval()


def load(model: Any, weights: Weights) -> None:
    """Give a model weights that transformers has; the bias that only Megatron's T5 has stays zero."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    own = [name for name in missing if not name.endswith(("_extra_state", "output_layer.bias"))]
    assert (own, unexpected) == ([], [])


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_logits_are_those_of_transformers(case: str, pg_collection: ProcessGroupCollection) -> None:
    config, carry = MODELS[case]
    reference = theirs(config)
    model = ours(config, pg_collection)
    load(model, carry(reference.config, reference.state_dict()))
    generator = torch.Generator().manual_seed(3)
    source, tokens = (torch.randint(96, (2, length), generator=generator) for length in (40, 24))
    if reference.config.is_encoder_decoder:
        expected = reference(input_ids=source, decoder_input_ids=tokens).logits
        found = model(source, tokens, None, None, None)
    else:
        expected = reference(tokens, use_cache=False).logits
        found = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
