"""Multi-latent attention: keys and values of all heads are projected from one latent."""

from __future__ import annotations

import math

from bridge.models.huggingface.fields.norms import rms_norm_of
from bridge.models.huggingface.fields.rope import (
    Scaling,
    find_scaling,
    read_mscales,
    read_scaling,
    read_yarn_range,
    rope_names,
    write_yarn_range,
)
from bridge.models.huggingface.fields.row import Row, always, derived, same
from bridge.models.huggingface.targets import LATENT_TRANSFORMER
from bridge.models.huggingface.translation import COUNT, Name, Translation


def _read_queries(t: Translation) -> None:
    t["transformer._target_"] = LATENT_TRANSFORMER
    t["transformer.q_lora_rank"] = t["q_lora_rank"]


def _write_queries(t: Translation) -> None:
    t["q_lora_rank"] = t["transformer.q_lora_rank"]


def _read_positions(t: Translation) -> None:
    scaling = find_scaling(t)
    t["position_embedding_type"] = "rope"
    t["transformer.rotary_base"] = float(scaling.get("rope_theta", t["rope_theta"]))
    if scaling.get("partial_rotary_factor", t["partial_rotary_factor"]) not in (None, 1):
        t.refuse("partial_rotary_factor", f"{t.model_type} rotates qk_rope_head_dim channels of each head: must be 1")
    t["transformer.rope_type"] = "rope"
    read_scaling(t, scaling, {"yarn": _read_yarn})


def _read_yarn(t: Translation, scaling: Scaling) -> None:
    mscale, all_dim = read_mscales(scaling)
    if mscale is None and all_dim is not None:
        scaling.refuse("mscale_all_dim", "Megatron-Core also scales sines and cosines by it: set mscale too")
    if not scaling.flag("truncate", True):
        scaling.refuse("truncate", "Megatron-Core rounds the range of channels where frequencies change: must be true")
    t["transformer.rope_type"] = "yarn"
    read_yarn_range(t, scaling, "transformer.")
    # Without mscale_all_dim, transformers uses 1 for mscale.
    t["transformer.mscale"] = float(mscale if mscale and all_dim else 1)
    t["transformer.mscale_all_dim"] = float(all_dim or 0)


def _write_positions(t: Translation) -> None:
    if t["position_embedding_type"] != "rope":
        t.refuse("position_embedding_type", f"{t.model_type} has rotary positions: must be rope")
    if t["transformer.rotary_percent"] != 1:
        t.refuse("transformer.rotary_percent", f"{t.model_type} rotates all qk_pos_emb_head_dim channels: must be 1.0")
    t["rope_theta"] = t["transformer.rotary_base"]
    if t["transformer.rope_type"] == "rope":
        if t["transformer.mscale_all_dim"] and t["transformer.rotary_scaling_factor"] > 1:
            t.refuse(
                "transformer.mscale_all_dim",
                "Megatron-Core scales attention scores by it even where rope_type is rope: must be 0",
            )
        return
    scaling = write_yarn_range(t, "transformer.")
    mscale, all_dim = t["transformer.mscale"], t["transformer.mscale_all_dim"]
    if mscale and all_dim:
        scaling |= {"mscale": mscale, "mscale_all_dim": all_dim}
    elif all_dim or not math.isclose(mscale, 1):
        t.refuse(
            "transformer.mscale",
            "transformers ignores it unless mscale and mscale_all_dim are set: must be 1, and mscale_all_dim 0",
        )
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


def _key_value_heads(default: int | None) -> Row:
    """Return the row of ``num_key_value_heads``, which must equal ``num_attention_heads``."""

    def read(t: Translation) -> None:
        heads, groups = t["num_attention_heads"], t["num_key_value_heads"]
        if groups not in (None, heads):
            t.refuse(
                "num_key_value_heads",
                f"{t.model_type} has keys and values for each head: must equal num_attention_heads, {heads}",
            )

    def write(t: Translation) -> None:
        t["num_key_value_heads"] = t["transformer.num_attention_heads"]

    return Row({"num_key_value_heads": Name(COUNT, default, null=True)}, (), read, write)


def latent_attention(key_value_heads: int | None) -> tuple[Row, ...]:
    """Return the rows of multi-latent attention, with its positions and norms.

    Args:
        key_value_heads: The default of ``num_key_value_heads`` in transformers.
    """
    return (
        Row(
            {"q_lora_rank": Name(COUNT, 1536, null=True)},
            ("transformer.q_lora_rank",),
            _read_queries,
            _write_queries,
        ),
        always("transformer.multi_latent_attention", True, "{model_type} uses multi-latent attention"),
        always("transformer.qk_layernorm", True, "{model_type} normalises latents"),
        same("kv_lora_rank", "transformer.kv_lora_rank", COUNT, 512),
        same("qk_nope_head_dim", "transformer.qk_head_dim", COUNT, 128),
        same("qk_rope_head_dim", "transformer.qk_pos_emb_head_dim", COUNT, 64),
        same("v_head_dim", "transformer.v_head_dim", COUNT, 128),
        _key_value_heads(key_value_heads),
        derived("head_dim", lambda t: t["qk_rope_head_dim"], "qk_rope_head_dim"),
        derived(
            "qk_head_dim",
            lambda t: t["qk_nope_head_dim"] + t["qk_rope_head_dim"],
            "the sum of qk_nope_head_dim and qk_rope_head_dim",
        ),
        _POSITIONS,
        *rms_norm_of("rms_norm_eps", 1e-6, "latent norms"),
    )
