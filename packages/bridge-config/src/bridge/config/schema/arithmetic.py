"""Checks between the fields of a config that hold for every parallel layout.

A check reads a config by attribute, either a live config or the view of a document. It yields problems: the path of a
field relative to the config, and a message. Every rule matches megatron-core 0.19.2: a refused config fails there when
the model is built or in its first step, or trains a model that differs from what its fields say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bridge.config.schema import hybrid_pattern
from bridge.config.schema.ranges import COUNT, LANGUAGE, LATENT, MAMBA, NOT_NEGATIVE, T5, TRANSFORMER, Range, get_ranges
from bridge.config.schema.registry import get_document_name

NEEDED_SIZES = ("num_layers", "hidden_size", "num_attention_heads")
"""Fields that every TransformerConfig must set. The constructor accepts their default, 0, but no model can be built."""

Problems = Iterator[tuple[str, str]]
Check = Callable[[Any], Problems]


def check_fields(config: Any, bases: tuple[str, ...]) -> Problems:
    """Yield the problems between the fields of a config, using the checks of its class and of each base class.

    Args:
        config: A live config or the view of one; each field on its own must be within its range.
        bases: The dotted names of its class and base classes.
    """
    for base in bases:
        for check in CHECKS.get(base, ()):
            yield from check(config)


def check_live(config: Any, prefix: str = "") -> Problems:
    """Yield the problems of a live config: its ranges, or, if these hold, the checks between its fields.

    Args:
        config: A config. Configs embedded in it are not checked.
        prefix: Prepended to each path.
    """
    bases = tuple(name for base in type(config).__mro__ if (name := get_document_name(base)))
    found = [
        (name, problem)
        for name, allowed in get_ranges(bases).items()
        if (problem := allowed.find_problem(getattr(config, name, None)))
    ]
    for path, message in found or check_fields(config, bases):
        yield prefix + path, message


def _check_ranges(config: Any, names: str, allowed: Range) -> list[tuple[str, str]]:
    """Return the problems of fields (separated by spaces) whose range applies to some models only."""
    return [(name, message) for name in names.split() if (message := allowed.find_problem(getattr(config, name)))]


# --- Transformers


def _check_sizes(config: Any) -> Problems:
    yield from ((name, "required, but missing") for name in NEEDED_SIZES if not getattr(config, name))


def _check_heads(config: Any) -> Problems:
    hidden, heads, channels = config.hidden_size, config.num_attention_heads, config.kv_channels
    if not (hidden and heads):
        return
    if channels == 0:
        yield (
            "num_attention_heads",
            f"must be at most hidden_size = {hidden}, got {heads}: choose fewer heads, or set kv_channels",
        )
        return
    if config.multi_latent_attention:  # its head sizes are q_lora_rank, qk_head_dim, v_head_dim, ...
        return
    # The constructor rounds the quotient down, and channels would be lost. A live config does not tell whether
    # kv_channels was given or derived, the view of a document does.
    if hidden % heads and "kv_channels" in getattr(config, "derived", ()):
        yield (
            "num_attention_heads",
            f"must divide hidden_size = {hidden}, got {heads}: choose a divisor, or set kv_channels",
        )
    if heads % config.num_query_groups:
        yield (
            "num_query_groups",
            f"must divide num_attention_heads = {heads}, got {config.num_query_groups}",
        )


def _check_experts(config: Any) -> Problems:
    # TransformerConfig checks these without experts too.
    problems = _check_ranges(config, "moe_shared_expert_intermediate_size", COUNT)
    problems += _check_ranges(config, "moe_router_group_topk", NOT_NEGATIVE)
    if _reads_layer_kinds(config):
        problems += _check_ranges(config, "moe_layer_freq", COUNT)
    if config.num_moe_experts is not None:
        problems += _check_ranges(config, "moe_ffn_hidden_size moe_latent_size moe_router_topk", COUNT)
        problems += _check_ranges(config, "moe_router_num_groups", NOT_NEGATIVE)
    yield from problems or _check_routing(config)


def _reads_layer_kinds(config: Any) -> bool:
    """Return whether the model reads ``moe_layer_freq``.

    MTP layers read it even without experts; a hybrid model uses its layer pattern instead.
    """
    return (config.num_moe_experts is not None or bool(config.mtp_num_layers)) and not config.is_hybrid_model


def _check_routing(config: Any) -> Problems:
    experts, topk = config.num_moe_experts, config.moe_router_topk
    softmax = config.moe_router_score_function == "softmax" and config.moe_router_load_balancing_type != "sinkhorn"
    if topk == 1 and softmax and not config.moe_router_pre_softmax:
        yield (
            "moe_router_topk",
            "the softmax over one chosen expert has no gradient: set moe_router_pre_softmax to true, or choose at "
            "least 2 experts",
        )
    if _reads_layer_kinds(config):
        yield from _check_layer_flags(config, "moe_layer_freq", "0 (dense) or 1 (experts)")
    if experts is None:
        # TransformerConfig derives it from the deprecated field without asking for experts.
        is_derived = bool(config.moe_router_topk_limited_devices)
        names = ["moe_router_group_topk"] if config.moe_router_group_topk and not is_derived else []
        if config.moe_ffn_hidden_size is not None and not _is_mixed(config.moe_layer_freq):
            names.append("moe_ffn_hidden_size")
        yield from ((name, "requires num_moe_experts: set num_moe_experts, or remove this field") for name in names)
        return
    has_experts = config.is_hybrid_model or not isinstance(config.moe_layer_freq, list) or any(config.moe_layer_freq)
    if topk > experts and has_experts:
        yield "moe_router_topk", f"must be at most num_moe_experts = {experts}, got {topk}"
    elif config.moe_router_group_topk:
        yield from _check_expert_groups(config, has_experts=has_experts)


def _is_mixed(every: object) -> bool:
    """Return whether ``moe_layer_freq`` gives both dense and expert layers, judged as TransformerConfig does."""
    return 0 in every if isinstance(every, list) else isinstance(every, int) and every > 1


def _check_expert_groups(config: Any, *, has_experts: bool) -> Problems:
    experts, topk = config.num_moe_experts, config.moe_router_topk
    groups, chosen = config.moe_router_num_groups, config.moe_router_group_topk
    if not groups:
        yield "moe_router_group_topk", "requires moe_router_num_groups: set moe_router_num_groups, or remove this field"
    elif experts % groups:
        yield "moe_router_num_groups", f"must divide num_moe_experts = {experts}, got {groups}"
    elif chosen > groups:
        yield "moe_router_group_topk", f"must be at most moe_router_num_groups = {groups}, got {chosen}"
    elif topk < chosen and has_experts:
        yield "moe_router_group_topk", f"must be at most moe_router_topk = {topk}, got {chosen}"
    elif topk > chosen * (experts // groups) and has_experts:
        yield (
            "moe_router_topk",
            f"must be at most {chosen * (experts // groups)}, got {topk}: moe_router_group_topk = {chosen} selects "
            f"{chosen} groups of {experts // groups} experts; lower this field, or select more groups",
        )


def _check_windows(config: Any) -> Problems:
    if config.window_size:
        problems = _check_ranges(config, "window_attn_skip_freq", COUNT)
        yield from problems or _check_layer_flags(config, "window_attn_skip_freq", "0 (all tokens) or 1 (window)")


def _check_no_rope_layers(config: Any) -> Problems:
    every, layers = config.no_rope_freq, config.num_layers
    if isinstance(every, int) and every and layers % every:
        yield "no_rope_freq", f"must divide num_layers = {layers}, got {every}"
    elif every and not isinstance(every, int) and len(every) != layers:
        yield "no_rope_freq", f"expected one entry per layer (num_layers = {layers}), got {len(every)}"


def _check_layer_flags(config: Any, name: str, meaning: str) -> Problems:
    """Check a field that is a list with a 0 or 1 per layer; any other kind of value passes.

    Args:
        config: A transformer config.
        name: The field.
        meaning: The meaning of 0 and 1, for the message.
    """
    flags = getattr(config, name)
    if not isinstance(flags, (list, tuple)):
        return
    if len(flags) != config.num_layers:
        yield name, f"expected one entry per layer (num_layers = {config.num_layers}), got {len(flags)}"
    for at, flag in enumerate(flags):
        if flag not in (0, 1):
            yield f"{name}[{at}]", f"expected {meaning}, got {flag}"


def _check_precision(config: Any) -> Problems:
    if config.fp16 and config.bf16:
        yield "fp16", "fp16 and bf16 cannot both be true: set one of them to false"


def _check_latent_attention(config: Any) -> Problems:
    if not config.multi_latent_attention:
        return
    sizes = "q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim"
    problems = _check_ranges(config, sizes, COUNT)
    yield from problems
    if not problems and config.qk_pos_emb_head_dim % 2:
        yield "qk_pos_emb_head_dim", f"must be even, got {config.qk_pos_emb_head_dim}: channels are rotated in pairs"


# --- Models


def _check_rotary_channels(model: Any) -> Problems:
    transformer = model.transformer
    rotates = model.position_embedding_type in ("rope", "mrope", "yarn")
    layers = getattr(model, "hybrid_layer_pattern", hybrid_pattern.ATTENTION) or hybrid_pattern.MAMBA
    if not rotates or hybrid_pattern.ATTENTION not in layers or transformer.multi_latent_attention:
        return
    channels = transformer.kv_channels
    share = model.rotary_percent if model.position_embedding_type != "yarn" else 1
    if not share:
        yield (
            "rotary_percent",
            "no channels are rotated: set rotary_percent above 0, or set position_embedding_type to none",
        )
    elif share == 1 and channels % 2:  # if only part is rotated, megatron-core rounds an odd number up
        yield "transformer.kv_channels", f"must be even, got {channels}: channels are rotated in pairs"


def _check_hybrid_layers(model: Any) -> Problems:
    pattern, transformer = model.hybrid_layer_pattern, model.transformer
    if pattern is None and transformer.num_layers > hybrid_pattern.MAX_LAYERS:
        yield (
            "transformer.num_layers",
            f"must be at most {hybrid_pattern.MAX_LAYERS} without hybrid_layer_pattern, got {transformer.num_layers}",
        )
        return
    if pattern is None:
        pattern = hybrid_pattern.MAMBA * transformer.num_layers
    elif (message := hybrid_pattern.find_problem(pattern, transformer.num_layers)) is not None:
        yield "hybrid_layer_pattern", message
        return
    if hybrid_pattern.EXPERTS in pattern and not transformer.num_moe_experts:
        yield (
            "hybrid_layer_pattern",
            f"{pattern} has expert layers (E), but no experts: set transformer.num_moe_experts",
        )
    depths = hybrid_pattern.count_prediction_depths(pattern)
    if depths != (transformer.mtp_num_layers or 0):
        yield (
            "hybrid_layer_pattern",
            f"{pattern} has {depths} MTP depths (one for each /), but transformer.mtp_num_layers = "
            f"{transformer.mtp_num_layers}: change one of them",
        )
    yield from _check_hybrid_attention(pattern, transformer)
    if not transformer.is_hybrid_model:
        yield (
            "transformer.is_hybrid_model",
            "must be true for a hybrid model, got false: output weights would be initialized for two residual blocks "
            "per layer, and a hybrid layer is one",
        )
    if hybrid_pattern.MAMBA in pattern:
        yield from ((f"transformer.{name}", message) for name, message in _check_mamba_sizes(transformer))


_VARIANTS = {"dsa": hybrid_pattern.SPARSE_ATTENTION, "gated_delta_net": hybrid_pattern.DELTA_NET}


def _check_hybrid_attention(pattern: str, transformer: Any) -> Problems:
    """Check that the attention layers of the pattern match the attention fields of the transformer.

    Hybrid models of megatron-core 0.19.2 follow the pattern and silently ignore these fields.
    """
    latent = (hybrid_pattern.LATENT_ATTENTION, hybrid_pattern.SPARSE_ATTENTION)
    if transformer.multi_latent_attention and hybrid_pattern.ATTENTION in pattern:
        yield (
            "transformer.multi_latent_attention",
            f"is true, but hybrid_layer_pattern {pattern} has plain attention (*): write {latent[0]} for multi-latent "
            "attention, or use a plain TransformerConfig",
        )
    if any(symbol in pattern for symbol in latent) and not transformer.multi_latent_attention:
        yield (
            "transformer.multi_latent_attention",
            f"is false, but hybrid_layer_pattern {pattern} has latent attention ({latent[0]} or {latent[1]}): use an "
            "MLATransformerConfig with multi_latent_attention = true",
        )
    variant = transformer.experimental_attention_variant
    if variant is not None and _VARIANTS.get(variant, variant) not in hybrid_pattern.get_layers(pattern):
        yield (
            "transformer.experimental_attention_variant",
            f"is {variant}, but hybrid_layer_pattern {pattern} has no such layer ({_VARIANTS.get(variant)}): add one, "
            "or set this field to null",
        )
    if transformer.heterogeneous_block_specs:
        yield (
            "transformer.heterogeneous_block_specs",
            "has no effect on a hybrid model, whose layers come from hybrid_layer_pattern: use a plain "
            "TransformerConfig",
        )


def count_mamba_heads(config: Any) -> int:
    """Return the number of heads of a Mamba layer: ``mamba_num_heads``, or ``2 * hidden_size // mamba_head_dim``.

    Megatron-core's inner Mamba size is twice the hidden size.
    """
    heads: int = config.mamba_num_heads or 2 * config.hidden_size // config.mamba_head_dim
    return heads


def _check_mamba_sizes(config: Any) -> Problems:
    problems = _check_ranges(config, "mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads", COUNT)
    yield from problems
    if problems:
        return
    size, groups = config.mamba_head_dim, config.mamba_num_groups
    if config.mamba_num_heads is None and 2 * config.hidden_size % size:
        yield (
            "mamba_head_dim",
            f"must divide 2 * hidden_size = {2 * config.hidden_size}, got {size}: choose a divisor, or set "
            "mamba_num_heads",
        )
        return
    heads = count_mamba_heads(config)
    if heads % groups:
        yield "mamba_num_groups", f"must divide the number of Mamba heads, {heads}, got {groups}"


def _check_t5_heads(model: Any) -> Problems:
    transformer = model.transformer
    if transformer.num_query_groups != transformer.num_attention_heads:
        yield (
            "transformer.num_query_groups",
            f"must equal num_attention_heads = {transformer.num_attention_heads}, got {transformer.num_query_groups}: "
            "megatron-core's cross attention has no grouped queries; remove this field",
        )


def _check_t5_positions(model: Any) -> Problems:
    transformer = model.transformer
    heads = model.encoder_num_attention_heads
    if model.position_embedding_type == "relative":
        yield from _check_buckets(model)
        if heads not in (None, transformer.num_attention_heads):
            # In megatron-core 0.19.2 the encoder's relative bias has the decoder's number of heads.
            yield (
                "encoder_num_attention_heads",
                f"must equal transformer.num_attention_heads = {transformer.num_attention_heads} with relative "
                f"positions, got {heads}: remove this field",
            )
    channels = model.encoder_kv_channels
    if model.position_embedding_type == "rope" and channels not in (None, transformer.kv_channels):
        # In megatron-core 0.19.2 both stacks use the rotary frequencies of the decoder's kv_channels.
        yield (
            "encoder_kv_channels",
            f"must equal transformer.kv_channels = {transformer.kv_channels} with rotary positions, got {channels}: "
            "remove this field",
        )


def _check_buckets(model: Any) -> Problems:
    """Check the bucket count against the largest distance.

    The decoder gives one bucket each to the first half of its distances; the rest grow logarithmically up to the
    maximum, which must lie beyond them. The encoder splits its buckets between both directions, so its bound is lower.
    """
    buckets, distance = model.relative_attention_num_buckets, model.relative_attention_max_distance
    if distance <= buckets // 2:
        yield (
            "relative_attention_max_distance",
            f"must be greater than relative_attention_num_buckets // 2 = {buckets // 2}, got {distance}: increase it, "
            "or lower relative_attention_num_buckets",
        )


CHECKS: Mapping[str, Sequence[Check]] = {
    TRANSFORMER: (_check_sizes, _check_heads, _check_experts, _check_windows, _check_no_rope_layers, _check_precision),
    LATENT: (_check_latent_attention,),
    LANGUAGE: (_check_rotary_channels,),
    MAMBA: (_check_hybrid_layers,),
    T5: (_check_t5_heads, _check_t5_positions),
}
"""The checks by config class. Subclasses inherit them."""
