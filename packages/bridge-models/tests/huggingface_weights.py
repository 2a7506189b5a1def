"""Weights of transformers' classes under the names of Megatron's; they differ in how they put them together.

Megatron fuses queries, keys and values, a group of heads after the other, and gate and up projections.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Weights = dict[str, torch.Tensor]
Carry = Callable[[Any, Weights], Weights]
"""Ours from those of transformers, and its config."""


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


CARRY: dict[str, Carry] = {"gpt2": gpt2, "mamba2": mamba, "nemotron_h": mamba, "t5": t5}
"""By ``model_type``; all others name their weights as Llama does."""


def carry(config: Any, weights: Weights) -> Weights:
    return CARRY.get(config.model_type, llama)(config, weights)
