"""Rules about sizes that a layout divides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bridge.config.schema import hybrid_pattern
from bridge.config.schema.arithmetic import check_live
from bridge.dist.checks.preflight import MEGATRON, Rule, Setup, rule
from bridge.dist.layout import CONFIG_FIELDS, has_custom_split


@rule(observed_in=MEGATRON, is_first=True)
def values_fit(setup: Setup) -> Iterator[str]:
    """Invalid sizes and contradictory fields raise a bare error during the build or in the first step, or train a
    different model. Documents with such values are refused when they are read.
    """
    problems = [*check_live(setup.transformer, "transformer."), *check_live(setup.model)]
    yield from (f"{path}: {message}" for path, message in problems)


@rule()
def groups_fit_configuration(setup: Setup) -> Iterator[str]:
    """Megatron splits layers by the process groups in some places and by the configuration in others, so both must
    agree.
    """
    names = ["tp", "pp", "cp", "ep"]
    if setup.transformer.num_moe_experts:
        names.append("etp")
    for name in names:
        configured, ranks = getattr(setup.transformer, CONFIG_FIELDS[name]), getattr(setup.layout, name)
        if configured != ranks:
            yield (
                f"{CONFIG_FIELDS[name]} is {configured} but the {name} process group has {ranks} rank(s): "
                f"set it to {ranks}, or create the process groups with {name} = {configured}"
            )


@rule()
def heads_divide(setup: Setup) -> Iterator[str]:
    """Each tensor-parallel rank holds whole attention heads. It holds whole query groups, or shares one with others."""
    tp, heads, groups = setup.layout.tp, setup.transformer.num_attention_heads, setup.transformer.num_query_groups
    if heads % tp:
        yield f"num_attention_heads = {heads} is not a multiple of tp = {tp}: choose a tp that divides it"
    if groups and groups % tp and tp % groups:
        yield (
            f"num_query_groups = {groups} is neither a multiple nor a divisor of tp = {tp}: "
            "choose a tp that divides it or is a multiple of it"
        )


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
    """Return whether any layer has a dense feed-forward network, as opposed to experts."""
    config = setup.transformer
    model: Any = setup.model
    if hasattr(model, "hybrid_layer_pattern"):
        return hybrid_pattern.MLP in (model.hybrid_layer_pattern or "")
    # Either an interval of expert layers, or a list with 1 for each expert layer and 0 for each dense one.
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
    """All stages have the same number of layers unless the configuration assigns layers to stages."""
    pattern: str | None = getattr(setup.model, "hybrid_layer_pattern", None)
    if has_custom_split(setup.transformer) or "|" in (pattern or ""):  # | separates the stages of a hybrid model
        return
    pp, vp = setup.layout.pp, setup.layout.vp if setup.has_virtual_pipeline else 1
    layers, stages = setup.transformer.num_layers, pp * vp
    if layers % stages:
        yield (
            f"num_layers = {layers} does not divide into pp x vp = {pp} x {vp} = {stages} equal stages: change pp or "
            f"vp, {_suggest_counting(layers, stages)}or assign layers to stages in pipeline_model_parallel_layout"
        )


def _suggest_counting(layers: int, stages: int) -> str:
    """Suggest counting the embedding or the loss as a layer if the layers then divide; empty if they do not."""
    if (layers + 2) % stages == 0:
        return "set account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split to True, "
    if (layers + 1) % stages == 0:
        return "set account_for_embedding_in_pipeline_split or account_for_loss_in_pipeline_split to True, "
    return ""


_CONSTRUCTOR = "the constructor of TransformerConfig refuses it too"


@rule(observed_in=MEGATRON, no_reproduction=_CONSTRUCTOR)
def sequences_without_tensor_parallelism(setup: Setup) -> Iterator[str]:
    """Sequence parallelism splits activations that tensor-parallel ranks would otherwise replicate."""
    if setup.transformer.sequence_parallel and setup.layout.tp == 1:
        yield "sequence_parallel needs tensor parallelism, got tp = 1: set sequence_parallel = False, or tp > 1"


@rule(observed_in=MEGATRON, no_reproduction=_CONSTRUCTOR)
def expert_parallelism_without_experts(setup: Setup) -> Iterator[str]:
    """A model without experts has nothing that expert parallelism could split."""
    if setup.layout.ep > 1 and setup.transformer.num_moe_experts is None:
        yield f"ep = {setup.layout.ep}, but the model has no experts: set ep = 1, or num_moe_experts"


@rule(observed_in=MEGATRON, no_reproduction=_CONSTRUCTOR)
def biases_of_split_experts(setup: Setup) -> Iterator[str]:
    """Megatron does not split the biases of an expert over tensor-parallel ranks."""
    config = setup.transformer
    if config.num_moe_experts and config.add_bias_linear and setup.layout.etp != 1:
        yield (
            f"experts cannot have biases with etp = {setup.layout.etp} (expert tensor parallelism): "
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
