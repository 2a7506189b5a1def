"""Sizes that a layout divides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bridge.config.schema import hybrid_pattern
from bridge.config.schema.arithmetic import check_live
from bridge.dist.checks.preflight import MEGATRON, Rule, Setup, rule
from bridge.dist.layout import CONFIG_FIELDS, has_custom_split


@rule(seen=MEGATRON, is_first=True)
def values_fit(setup: Setup) -> Iterator[str]:
    """Sizes that no model has, and fields that contradict each other, end in a bare error while a model is built or in
    its first step, or train something else. Documents with such values are refused when they are read.
    """
    found = [*check_live(setup.transformer, "transformer."), *check_live(setup.model)]
    yield from (f"{path}: {said}" for path, said in found)


@rule()
def groups_fit_configuration(setup: Setup) -> Iterator[str]:
    """Megatron cuts layers by the process groups in some places and by the configuration in others."""
    names = ["tp", "pp", "cp", "ep"]
    if setup.transformer.num_moe_experts:
        names.append("etp")
    for name in names:
        wanted, there = getattr(setup.transformer, CONFIG_FIELDS[name]), getattr(setup.layout, name)
        if wanted != there:
            yield (
                f"{CONFIG_FIELDS[name]} is {wanted} but the {name} process group has {there} rank(s): "
                f"set it to {there}, or create the groups for {wanted}"
            )


@rule()
def heads_divide(setup: Setup) -> Iterator[str]:
    """Each tensor-parallel rank holds whole attention heads, and whole query groups or a share of one."""
    tp, heads, groups = setup.layout.tp, setup.transformer.num_attention_heads, setup.transformer.num_query_groups
    if heads % tp:
        yield f"num_attention_heads = {heads} is not a multiple of tp = {tp}: choose a tp that divides it"
    if groups and groups % tp and tp % groups:
        yield f"num_query_groups = {groups} is neither a multiple nor a divisor of tp = {tp}: choose a tp that is"


@rule()
def feed_forward_divides(setup: Setup) -> Iterator[str]:
    """Each tensor-parallel rank holds an equal part of every feed-forward layer."""
    config = setup.transformer
    if hasattr(config, "per_block_parameters"):  # a heterogeneous model gives each layer its own sizes
        return
    is_moe = config.num_moe_experts is not None
    sizes = {
        ("ffn_hidden_size", "tp"): has_dense_layers(setup),
        ("moe_ffn_hidden_size", "etp"): is_moe,
        ("moe_shared_expert_intermediate_size", "tp"): is_moe,
    }
    for (name, axis), applies in sizes.items():
        size, ranks = getattr(config, name), getattr(setup.layout, axis)
        if applies and size is not None and size % ranks:
            yield f"{name} = {size} is not a multiple of {axis} = {ranks}: choose a multiple, or another {axis}"


def has_dense_layers(setup: Setup) -> bool:
    """Whether any layer has a feed-forward network that is no layer of experts."""
    config = setup.transformer
    model: Any = setup.model
    if hasattr(model, "hybrid_layer_pattern"):
        return hybrid_pattern.MLP in (model.hybrid_layer_pattern or "")
    layers = config.moe_layer_freq if isinstance(config.moe_layer_freq, list) else [config.moe_layer_freq]
    return config.num_moe_experts is None or any(every != 1 for every in layers)


@rule()
def experts_divide(setup: Setup) -> Iterator[str]:
    """Each expert-parallel rank holds the same number of experts."""
    experts, ep = setup.transformer.num_moe_experts, setup.layout.ep
    if experts and experts % ep:
        yield f"num_moe_experts = {experts} is not a multiple of ep = {ep}: choose an ep that divides it"


@rule()
def layers_divide(setup: Setup) -> Iterator[str]:
    """Stages are equal unless the configuration says how to split."""
    pattern: str | None = getattr(setup.model, "hybrid_layer_pattern", None)
    if has_custom_split(setup.transformer) or "|" in (pattern or ""):
        return
    pp, vp = setup.layout.pp, setup.layout.vp if setup.has_virtual_pipeline else 1
    layers, stages = setup.transformer.num_layers, pp * vp
    if layers % stages:
        yield (
            f"num_layers = {layers} does not divide into pp x vp = {pp} x {vp} = {stages} equal stages: change pp or "
            f"vp, {_suggest_counting(layers, stages)}or say how to split in pipeline_model_parallel_layout"
        )


def _suggest_counting(layers: int, stages: int) -> str:
    """What can count as a layer of its own, so that layers divide."""
    if (layers + 2) % stages == 0:
        return "set account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split to True, "
    if (layers + 1) % stages == 0:
        return "set account_for_embedding_in_pipeline_split or account_for_loss_in_pipeline_split to True, "
    return ""


_CONSTRUCTOR = "the constructor of TransformerConfig refuses it too"


@rule(seen=MEGATRON, not_shown=_CONSTRUCTOR)
def sequences_without_tensor_parallelism(setup: Setup) -> Iterator[str]:
    """Sequence parallelism splits what tensor-parallel ranks would hold twice."""
    if setup.transformer.sequence_parallel and setup.layout.tp == 1:
        yield "sequence_parallel splits sequences over tensor-parallel ranks, tp = 1: set it to False, or tp > 1"


@rule(seen=MEGATRON, not_shown=_CONSTRUCTOR)
def expert_parallelism_without_experts(setup: Setup) -> Iterator[str]:
    """There is nothing to split."""
    if setup.layout.ep > 1 and setup.transformer.num_moe_experts is None:
        yield f"ep = {setup.layout.ep}, but the model has no experts: set ep = 1, or num_moe_experts"


@rule(seen=MEGATRON, not_shown=_CONSTRUCTOR)
def biases_of_split_experts(setup: Setup) -> Iterator[str]:
    """An expert's biases are not split over tensor-parallel ranks."""
    config = setup.transformer
    if config.num_moe_experts and config.add_bias_linear and setup.layout.etp != 1:
        yield (
            f"experts that {setup.layout.etp} tensor-parallel ranks share (etp) have no biases: "
            "set add_bias_linear = False, or etp = 1"
        )


RULES: tuple[Rule, ...] = (
    values_fit,
    groups_fit_configuration,
    heads_divide,
    feed_forward_divides,
    experts_divide,
    layers_divide,
    sequences_without_tensor_parallelism,
    expert_parallelism_without_experts,
    biases_of_split_experts,
)
