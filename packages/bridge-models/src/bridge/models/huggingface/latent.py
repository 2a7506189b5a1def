"""GPTs of multi-latent attention: DeepSeek V2 and V3."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from bridge.config.refusal import got
from bridge.models.huggingface.common import (
    GATED,
    NO_BIASES,
    NO_HIDDEN_DROPOUT,
    activation,
    attention_dropout,
    language_model,
    rms_norm,
    sizes,
)
from bridge.models.huggingface.experts import balance, expert_width, experts, frequency, which_layers
from bridge.models.huggingface.mapping import (
    COUNT,
    FLAG,
    GPT,
    INTEGER,
    NUMBER,
    TEXT,
    Architecture,
    Name,
    Row,
    Translation,
    always,
    only,
    same,
)
from bridge.models.huggingface.rope import (
    Scaling,
    check_attention_factor,
    given_scaling,
    read_scaling,
    rope_names,
)

LATENT_TRANSFORMER = "megatron.core.transformer.transformer_config.MLATransformerConfig"

_EPSILON = 1e-6
"""Of the norms of latents, whatever ``rms_norm_eps`` is; Megatron-Core has one number for all norms."""


def derived(name: str, value: Callable[[Translation], Any], meaning: str) -> Row:
    """A field of config.json that follows from others; transformers saves some of those."""

    def read(t: Translation) -> None:
        if name in t and t[name] != value(t):
            t.refuse(name, f"it is {meaning} here, {got(value(t))}")

    return Row({name: Name(INTEGER)}, (), read, lambda t: None)


def _read_queries(t: Translation) -> None:
    t["transformer._target_"] = LATENT_TRANSFORMER
    t["transformer.q_lora_rank"] = t["q_lora_rank"]


def _write_queries(t: Translation) -> None:
    t["q_lora_rank"] = t["transformer.q_lora_rank"]


def _read_positions(t: Translation) -> None:
    scaling = given_scaling(t)
    t["position_embedding_type"] = "rope"
    t["transformer.rotary_base"] = float(scaling.get("rope_theta", t["rope_theta"]))
    if scaling.get("partial_rotary_factor", t["partial_rotary_factor"]) not in (None, 1):
        t.refuse("partial_rotary_factor", "this architecture rotates qk_rope_head_dim channels of a head")
    t["transformer.rope_type"] = "rope"
    read_scaling(t, scaling, {"yarn": _read_yarn})


def _read_yarn(t: Translation, scaling: Scaling) -> None:
    factor = scaling.factor()
    mscale, all_dim = (scaling.get(key) or None for key in ("mscale", "mscale_all_dim"))
    check_attention_factor(scaling, factor, mscale, all_dim)
    if mscale is None and all_dim is not None:
        scaling.refuse("mscale_all_dim", "Megatron-Core takes it for sines and cosines too: give mscale as well")
    if not scaling.flag("truncate", True):
        scaling.refuse("truncate", "Megatron-Core rounds the channels where frequencies change: it can only be true")
    t["transformer.rope_type"] = "yarn"
    t["transformer.rotary_scaling_factor"] = float(factor)
    t["transformer.original_max_position_embeddings"] = scaling.original(None)
    t["transformer.beta_fast"] = float(scaling.get("beta_fast") or 32)
    t["transformer.beta_slow"] = float(scaling.get("beta_slow") or 1)
    # without mscale_all_dim, transformers takes 1 for mscale
    t["transformer.mscale"] = float(mscale if mscale and all_dim else 1)
    t["transformer.mscale_all_dim"] = float(all_dim or 0)


def _write_positions(t: Translation) -> None:
    if t["position_embedding_type"] != "rope":
        t.refuse("position_embedding_type", "this architecture has rotary positions: it can only be rope")
    if t["transformer.rotary_percent"] != 1:
        t.refuse("transformer.rotary_percent", "this architecture rotates whole positional parts: it can only be 1.0")
    t["rope_theta"] = t["transformer.rotary_base"]
    if t["transformer.rope_type"] == "rope":
        if t["transformer.mscale_all_dim"] and t["transformer.rotary_scaling_factor"] > 1:
            t.refuse("transformer.mscale_all_dim", "Megatron-Core scales scores by it here too: set it to 0")
        return
    scaling = {
        "rope_type": "yarn",
        "factor": t["transformer.rotary_scaling_factor"],
        "original_max_position_embeddings": t["transformer.original_max_position_embeddings"],
        "beta_fast": t["transformer.beta_fast"],
        "beta_slow": t["transformer.beta_slow"],
    }
    mscale, all_dim = t["transformer.mscale"], t["transformer.mscale_all_dim"]
    if mscale and all_dim:
        scaling |= {"mscale": mscale, "mscale_all_dim": all_dim}
    elif all_dim or not math.isclose(mscale, 1):
        t.refuse("transformer.mscale", "transformers takes 1 where one of mscale and mscale_all_dim is 0")
    t["rope_scaling"] = scaling


_POSITIONS = Row(
    rope_names(10000.0),
    (
        "position_embedding_type",
        "transformer.rotary_base",
        "transformer.rotary_percent",
        "transformer.rope_type",
        "transformer.rotary_scaling_factor",
        "transformer.original_max_position_embeddings",
        "transformer.beta_fast",
        "transformer.beta_slow",
        "transformer.mscale",
        "transformer.mscale_all_dim",
    ),
    _read_positions,
    _write_positions,
)


def _as_many_keys(default: int | None) -> Row:
    """``num_key_value_heads`` says nothing new: each head has keys and values of its own."""

    def read(t: Translation) -> None:
        heads, groups = t["num_attention_heads"], t["num_key_value_heads"]
        if groups not in (None, heads):
            t.refuse("num_key_value_heads", f"it can only be num_attention_heads here, {heads}")

    def write(t: Translation) -> None:
        t["num_key_value_heads"] = t["transformer.num_attention_heads"]

    return Row({"num_key_value_heads": Name(COUNT, default, null=True)}, (), read, write)


def _latent_attention(key_value_heads: int | None) -> tuple[Row, ...]:
    return (
        Row(
            {"q_lora_rank": Name(COUNT, 1536, null=True)},
            ("transformer.q_lora_rank",),
            _read_queries,
            _write_queries,
        ),
        always("transformer.multi_latent_attention", True, "this architecture has multi-latent attention"),
        always("transformer.qk_layernorm", True, "latents of this architecture are normalised"),
        same("kv_lora_rank", "transformer.kv_lora_rank", COUNT, 512),
        same("qk_nope_head_dim", "transformer.qk_head_dim", COUNT, 128),
        same("qk_rope_head_dim", "transformer.qk_pos_emb_head_dim", COUNT, 64),
        same("v_head_dim", "transformer.v_head_dim", COUNT, 128),
        _as_many_keys(key_value_heads),
        derived("head_dim", lambda t: t["qk_rope_head_dim"], "qk_rope_head_dim"),
        derived(
            "qk_head_dim",
            lambda t: t["qk_nope_head_dim"] + t["qk_rope_head_dim"],
            "the sum of qk_nope_head_dim and qk_rope_head_dim",
        ),
        _POSITIONS,
        *rms_norm("rms_norm_eps", _EPSILON),
        Row({}, ("transformer.layernorm_epsilon",), _read_epsilon, _write_epsilon),
    )


def _read_epsilon(t: Translation) -> None:
    if t["rms_norm_eps"] != _EPSILON:
        t.refuse("rms_norm_eps", f"norms of latents have {_EPSILON}, and Megatron-Core has one for all norms")


def _write_epsilon(t: Translation) -> None:
    if t["transformer.layernorm_epsilon"] != _EPSILON:
        t.refuse("transformer.layernorm_epsilon", f"norms of latents have {_EPSILON} in this architecture")


def _first_layers_dense(default: int) -> Row:
    """The first layers have no experts."""

    def read(t: Translation) -> None:
        layers, dense = t["num_hidden_layers"], t["first_k_dense_replace"] or 0
        if dense >= layers:
            raise t.refuse("first_k_dense_replace", "no layer has experts, and Megatron-Core wants some")
        t["transformer.moe_layer_freq"] = frequency([index >= dense for index in range(layers)])

    def write(t: Translation) -> None:
        has_experts = which_layers(t)
        if has_experts != sorted(has_experts):
            raise t.refuse("transformer.moe_layer_freq", "layers without experts come first in this architecture")
        t["first_k_dense_replace"] = has_experts.count(0)

    return Row(
        {"first_k_dense_replace": Name(INTEGER, default, null=True)}, ("transformer.moe_layer_freq",), read, write
    )


def _shared_experts(default: int) -> Row:
    """Experts for all tokens, as one that is as wide as all of them."""

    def read(t: Translation) -> None:
        t["transformer.moe_shared_expert_intermediate_size"] = t["n_shared_experts"] * t["moe_intermediate_size"]

    def write(t: Translation) -> None:
        path = "transformer.moe_shared_expert_intermediate_size"
        width, each = t[path], t["transformer.moe_ffn_hidden_size"] or t["transformer.ffn_hidden_size"]
        if width is None or not each or width % each:
            raise t.refuse(path, "this architecture has shared experts, as wide as the others")
        t["n_shared_experts"] = width // each

    fields = ("transformer.moe_shared_expert_intermediate_size",)
    return Row({"n_shared_experts": Name(COUNT, default)}, fields, read, write)


def scale_of_weights(default: float) -> Row:
    """What the weights of experts are multiplied by."""

    def read(t: Translation) -> None:
        if (scale := t["routed_scaling_factor"]) != 1:
            t["transformer.moe_router_topk_scaling_factor"] = float(scale)

    def write(t: Translation) -> None:
        t["routed_scaling_factor"] = t["transformer.moe_router_topk_scaling_factor"] or 1.0

    fields = ("transformer.moe_router_topk_scaling_factor",)
    return Row({"routed_scaling_factor": Name(NUMBER, default)}, fields, read, write)


_GROUPS = ("transformer.moe_router_num_groups", "transformer.moe_router_group_topk")


def sigmoid_router(groups: int, chosen_groups: int) -> tuple[Row, ...]:
    """A router of sigmoids, which normalises, and chooses groups by their best two experts.

    Megatron-Core goes by the best top-k / chosen groups.

    Args:
        groups: What transformers takes for ``n_group`` where it is left out.
        chosen_groups: Likewise for ``topk_group``.
    """

    def read(t: Translation) -> None:
        n_group, chosen, each = t["n_group"] or 1, t["topk_group"] or 1, t["num_experts_per_tok"]
        if t["norm_topk_prob"] != (each > 1):
            must = "true" if each > 1 else "false"
            t.refuse(
                "norm_topk_prob", f"Megatron-Core normalises where a token has several experts: it can only be {must}"
            )
        if n_group == 1:
            return
        if chosen < n_group and each // chosen != 2:
            raise t.refuse(
                "topk_group", f"groups count by their best two experts here, in Megatron-Core by {each // chosen}"
            )
        t["transformer.moe_router_num_groups"], t["transformer.moe_router_group_topk"] = n_group, chosen

    def write(t: Translation) -> None:
        n_group, chosen = (t[path] for path in _GROUPS)
        each = t["transformer.moe_router_topk"]
        if chosen and chosen < n_group and each // chosen != 2:
            t.refuse(_GROUPS[1], f"groups count by their best {each // chosen} experts, in this architecture by two")
        t["n_group"], t["topk_group"] = (n_group, chosen) if chosen else (1, 1)
        t["norm_topk_prob"] = each > 1

    names = {
        "n_group": Name(COUNT, groups, null=True),
        "topk_group": Name(COUNT, chosen_groups, null=True),
        "norm_topk_prob": Name(FLAG, True),
    }
    return (
        always("transformer.moe_router_score_function", "sigmoid", "routers of this architecture take sigmoids"),
        always(
            "transformer.moe_router_enable_expert_bias", True, "routers of this architecture have a bias to choose by"
        ),
        Row(names, _GROUPS, read, write),
    )


def _read_greedy(t: Translation) -> None:
    if t["topk_method"] != "group_limited_greedy":
        if t["topk_method"] not in ("greedy", None):
            t.refuse("topk_method", f"expected greedy or group_limited_greedy, got {got(t['topk_method'])}")
        return
    groups, chosen, each = t["n_group"], t["topk_group"], t["num_experts_per_tok"]
    if groups is None or chosen is None:
        raise t.refuse("topk_method", "groups need n_group and topk_group")
    if chosen < groups and each // chosen != 1:
        raise t.refuse(
            "topk_method",
            f"groups count by their best expert, in Megatron-Core by the best {each // chosen}, top-k / topk_group",
        )
    t["transformer.moe_router_num_groups"], t["transformer.moe_router_group_topk"] = groups, chosen


def _write_greedy(t: Translation) -> None:
    groups, chosen = (t[path] for path in _GROUPS)
    if not chosen:
        t["topk_method"] = "greedy"
        return
    each = t["transformer.moe_router_topk"]
    if chosen < groups and each // chosen != 1:
        t.refuse(_GROUPS[1], f"groups count by their best {each // chosen} experts, in this architecture by one")
    t["topk_method"], t["n_group"], t["topk_group"] = "group_limited_greedy", groups, chosen


_GREEDY = Row(
    {"topk_method": Name(TEXT, "greedy", null=True), "n_group": Name(COUNT), "topk_group": Name(COUNT)},
    _GROUPS,
    _read_greedy,
    _write_greedy,
)


def _read_predictions(t: Translation) -> None:
    if t["num_nextn_predict_layers"]:
        t["transformer.mtp_num_layers"] = t["num_nextn_predict_layers"]


def _write_predictions(t: Translation) -> None:
    t["num_nextn_predict_layers"] = t["transformer.mtp_num_layers"] or 0


_PREDICTIONS = Row(
    {"num_nextn_predict_layers": Name(INTEGER, 1)},
    ("transformer.mtp_num_layers",),
    _read_predictions,
    _write_predictions,
)
_ALIKE = (
    GATED,
    NO_BIASES,
    only("attention_bias", False, FLAG, "linear layers of Megatron-Core's multi-latent attention have no biases"),
    activation("hidden_act", "silu"),
    only("moe_layer_freq", 1, INTEGER, "all layers after the first ones have experts"),
    attention_dropout("attention_dropout", 0.0),
    NO_HIDDEN_DROPOUT,
    *language_model(tied=False),
)
_IGNORED = frozenset(("ep_size", "pretraining_tp"))

DEEPSEEK_V2 = Architecture(
    model_type="deepseek_v2",
    causal="DeepseekV2ForCausalLM",
    target=GPT,
    transformers=(LATENT_TRANSFORMER,),
    rows=(
        *sizes(
            vocab_size=102400,
            max_position_embeddings=2048,
            num_hidden_layers=32,
            hidden_size=4096,
            intermediate_size=11008,
            num_attention_heads=32,
        ),
        *_latent_attention(None),
        *experts("n_routed_experts", 64, None),
        expert_width("moe_intermediate_size", 1407),
        _shared_experts(2),
        _first_layers_dense(0),
        always("transformer.moe_router_pre_softmax", True, "routers of this architecture do not normalise"),
        only("norm_topk_prob", False, FLAG, "transformers does not normalise here", also=(None,)),
        only("scoring_func", "softmax", TEXT, "routers of this architecture take the softmax"),
        _GREEDY,
        scale_of_weights(1.0),
        balance("aux_loss_alpha", None, "seq_aux_loss"),
        only("seq_aux", True, FLAG, "the loss that balances experts is of each sequence"),
        only("mlp_bias", False, FLAG, "linear layers of this architecture have no biases"),
        *_ALIKE,
    ),
    aliases={"num_experts": "n_routed_experts"},
    ignored=_IGNORED,
)

DEEPSEEK_V3 = Architecture(
    model_type="deepseek_v3",
    causal="DeepseekV3ForCausalLM",
    target=GPT,
    transformers=(LATENT_TRANSFORMER,),
    rows=(
        *sizes(
            vocab_size=129280,
            max_position_embeddings=4096,
            num_hidden_layers=61,
            hidden_size=7168,
            intermediate_size=18432,
            num_attention_heads=128,
        ),
        *_latent_attention(128),
        only("rope_interleave", True, FLAG, "Megatron-Core rotates neighbouring channels"),
        *experts("n_routed_experts", 256, 8),
        expert_width("moe_intermediate_size", 2048),
        _shared_experts(1),
        _first_layers_dense(3),
        *sigmoid_router(8, 4),
        only("scoring_func", "sigmoid", TEXT, "routers of this architecture take sigmoids"),
        only("topk_method", "noaux_tc", TEXT, "routers of this architecture have a bias to choose by"),
        scale_of_weights(2.5),
        balance("aux_loss_alpha", None, "seq_aux_loss"),
        only("seq_aux", True, FLAG, "the loss that balances experts is of each sequence"),
        _PREDICTIONS,
        *_ALIKE,
    ),
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    ignored=_IGNORED,
)
