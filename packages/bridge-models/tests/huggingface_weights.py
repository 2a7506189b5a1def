"""Convert weights of transformers' classes to Megatron-Core's names and layouts.

Megatron-Core fuses queries, keys and values, interleaved by query group, and gate and up projections.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Weights = dict[str, torch.Tensor]
Converter = Callable[[Any, Weights], Weights]
"""Converts weights, given the config of transformers."""


def strip_prefix(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def add_prefix(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def rename(weights: Weights, names: dict[str, str]) -> Weights:
    """Return each module's weight, and its bias if it has one, under another name."""
    kinds = ("weight", "bias")
    return {
        f"{new}.{kind}": weights[f"{old}.{kind}"]
        for old, new in names.items()
        for kind in kinds
        if f"{old}.{kind}" in weights
    }


def fuse(weights: Weights, parts: list[str], name: str, *, groups: int = 1) -> Weights:
    """Return modules' weights and biases fused into one, in ``groups`` blocks with a share of each part."""
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
    """Convert Llama, and all architectures with its weight names."""
    found = rename(
        weights,
        {
            "model.embed_tokens": "embedding.word_embeddings",
            "model.norm": "decoder.final_layernorm",
        },
    )
    if not config.tie_word_embeddings:
        found |= rename(weights, {"lm_head": "output_layer"})
    for layer in range(config.num_hidden_layers):
        hf = strip_prefix(weights, f"model.layers.{layer}.")
        mcore = (
            rename(hf, {"input_layernorm": "input_layernorm", "post_attention_layernorm": "pre_mlp_layernorm"})
            | add_prefix("self_attention.", attention(config, strip_prefix(hf, "self_attn.")))
            | add_prefix("mlp.", mlp(strip_prefix(hf, "mlp.")))
        )
        found |= add_prefix(f"decoder.layers.{layer}.", mcore)
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
    found = fuse(weights, ["q_proj", "k_proj", "v_proj"], "linear_qkv", groups=groups)
    found |= rename(weights, {"o_proj": "linear_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"})
    if "sinks" in weights:
        found["core_attention.softmax_offset"] = weights["sinks"]
    return found


def latent_attention(weights: Weights) -> Weights:
    return rename(
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
    """Convert an MLP, or experts with their router and shared experts."""
    if not any(name.startswith("experts.") for name in weights):
        if "gate_proj.weight" in weights:
            found = fuse(weights, ["gate_proj", "up_proj"], "linear_fc1")
        else:
            found = rename(weights, {"gate_up_proj": "linear_fc1", "up_proj": "linear_fc1"})
        return found | rename(weights, {"down_proj": "linear_fc2"})
    found = rename(weights, {"gate": "router", "router": "router"})
    if "gate.e_score_correction_bias" in weights:
        found["router.expert_bias"] = weights["gate.e_score_correction_bias"]
    found |= add_prefix("experts.", experts(strip_prefix(weights, "experts.")))
    for name in ("shared_expert", "shared_experts"):
        if shared := strip_prefix(weights, f"{name}."):
            found |= add_prefix("shared_experts.", mlp(shared))
    if "shared_expert_gate.weight" in weights:
        found["shared_experts.gate_weight"] = weights["shared_expert_gate.weight"]
    return found


def experts(weights: Weights) -> Weights:
    """Split the tensors of all experts into matrices of each."""
    names = {"gate_up_proj": "linear_fc1.weight", "up_proj": "linear_fc1.weight", "down_proj": "linear_fc2.weight"}
    if "gate_up_proj_bias" in weights:  # GPT-OSS: stored as inputs x outputs, with alternating rows of gate and up
        names |= {"gate_up_proj_bias": "linear_fc1.bias", "down_proj_bias": "linear_fc2.bias"}
        weights = {name: tensor.transpose(-1, -2) if tensor.dim() == 3 else tensor for name, tensor in weights.items()}
        for name in ("gate_up_proj", "gate_up_proj_bias"):
            weights[name] = torch.cat([weights[name][:, 0::2], weights[name][:, 1::2]], dim=1)
    return {
        f"{mcore}{expert}": tensor
        for hf, mcore in names.items()
        if hf in weights
        for expert, tensor in enumerate(weights[hf])
    }


def gpt2(config: Any, weights: Weights) -> Weights:
    found = rename(
        weights,
        {
            "transformer.wte": "embedding.word_embeddings",
            "transformer.wpe": "embedding.position_embeddings",
            "transformer.ln_f": "decoder.final_layernorm",
        },
    )
    if not config.tie_word_embeddings:
        found |= rename(weights, {"lm_head": "output_layer"})
    for layer in range(config.n_layer):
        hf = {  # stored as inputs x outputs
            name: tensor.T if tensor.dim() == 2 else tensor
            for name, tensor in strip_prefix(weights, f"transformer.h.{layer}.").items()
        }
        for kind in ("weight", "bias"):
            for part, tensor in zip("qkv", hf[f"attn.c_attn.{kind}"].chunk(3), strict=True):
                hf[f"{part}.{kind}"] = tensor
        mcore = fuse(hf, ["q", "k", "v"], "self_attention.linear_qkv", groups=config.n_head) | rename(
            hf,
            {
                "ln_1": "input_layernorm",
                "attn.c_proj": "self_attention.linear_proj",
                "ln_2": "pre_mlp_layernorm",
                "mlp.c_fc": "mlp.linear_fc1",
                "mlp.c_proj": "mlp.linear_fc2",
            },
        )
        found |= add_prefix(f"decoder.layers.{layer}.", mcore)
    return found


def mamba(config: Any, weights: Weights) -> Weights:
    """Convert Mamba-2 and Nemotron-H, whose layers have one sublayer each."""
    weights = {name.replace("backbone.", "model."): tensor for name, tensor in weights.items()}
    found = rename(weights, {"model.embeddings": "embedding.word_embeddings", "model.norm_f": "decoder.final_norm"})
    if not config.tie_word_embeddings:
        found |= rename(weights, {"lm_head": "output_layer"})
    for layer in range(config.num_hidden_layers):
        hf = strip_prefix(weights, f"model.layers.{layer}.")
        mixer = strip_prefix(hf, "mixer.")
        if "in_proj.weight" in mixer:
            named = {name.replace("conv1d.", "conv1d_"): tensor for name, tensor in mixer.items()}
            mcore = add_prefix("mixer.", named) | rename(hf, {"norm": "norm"})
        elif "q_proj.weight" in mixer:
            mcore = add_prefix("self_attention.", attention(config, mixer)) | rename(hf, {"norm": "input_layernorm"})
        else:
            mcore = add_prefix("mlp.", mlp(mixer)) | rename(hf, {"norm": "pre_mlp_layernorm"})
        found |= add_prefix(f"decoder.layers.{layer}.", mcore)
    return found


def t5(config: Any, weights: Weights) -> Weights:
    found = rename(weights, {"shared": "embedding.word_embeddings"})
    if not config.scale_decoder_outputs:  # transformers 5 ties the output layer all the same
        found |= rename(weights, {"lm_head": "lm_head.output_layer"}) | rename(weights, {"lm_head": "output_layer"})
    for stack, layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        hf = strip_prefix(weights, f"{stack}.")
        found |= rename(
            weights,
            {
                f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias": f"{stack}_relative_pos_emb."
                "relative_attention_bias",
                f"{stack}.final_layer_norm": f"{stack}.final_layernorm",
            },
        )
        for layer in range(layers):
            mcore = t5_layer(config, strip_prefix(hf, f"block.{layer}."))
            found |= add_prefix(f"{stack}.layers.{layer}.", mcore)
    if config.scale_decoder_outputs:  # a factor on the last norm's output, which Megatron-Core's T5 lacks
        found["decoder.final_layernorm.weight"] = found["decoder.final_layernorm.weight"] * config.d_model**-0.5
    return found


def t5_layer(config: Any, weights: Weights) -> Weights:
    crosses = any("EncDecAttention" in name for name in weights)
    attends, crossing, feeds = "layer.0.SelfAttention", "layer.1.EncDecAttention", f"layer.{2 if crosses else 1}"
    fed = rename(
        strip_prefix(weights, f"{feeds}.DenseReluDense."),
        {"wi": "up_proj", "wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"},
    )
    found = (
        rename(
            weights,
            {
                "layer.0.layer_norm": "input_layernorm",
                f"{attends}.o": "self_attention.linear_proj",
                f"{feeds}.layer_norm": "pre_mlp_layernorm",
            },
        )
        | fuse(weights, [f"{attends}.{part}" for part in "qkv"], "self_attention.linear_qkv", groups=config.num_heads)
        | add_prefix("mlp.", mlp(fed))
    )
    if crosses:
        found |= rename(
            weights,
            {
                "layer.1.layer_norm": "pre_cross_attn_layernorm",
                f"{crossing}.q": "cross_attention.linear_q",
                f"{crossing}.o": "cross_attention.linear_proj",
            },
        ) | fuse(weights, [f"{crossing}.{part}" for part in "kv"], "cross_attention.linear_kv", groups=config.num_heads)
    return found


CONVERTERS: dict[str, Converter] = {"gpt2": gpt2, "mamba2": mamba, "nemotron_h": mamba, "t5": t5}
"""By ``model_type``; all other architectures name their weights like Llama."""


def convert_weights(config: Any, weights: Weights) -> Weights:
    return CONVERTERS.get(config.model_type, llama)(config, weights)
