"""Rules about sizes that a layout divides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bridge.config.schema import hybrid_pattern
from bridge.config.schema.arithmetic import check_live
from bridge.dist.checks.preflight import CONSTRUCTOR, MEGATRON, Rule, Setup, rule
from bridge.dist.layout import CONFIG_FIELDS, assigns_layers
from bridge.dist.nearest import divides, suggest


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
        yield f"num_attention_heads = {heads} is not a multiple of tp = {tp}: choose {_suggest_tp(setup)}"
    if groups and not _fits_groups(groups, tp):
        yield (
            f"num_query_groups = {groups} is neither a multiple nor a divisor of tp = {tp}: choose {_suggest_tp(setup)}"
        )


def _suggest_tp(setup: Setup) -> str:
    """Suggest the nearest tp that divides everything it splits. One rank always does."""
    heads, groups = setup.transformer.num_attention_heads, setup.transformer.num_query_groups
    widths = [width for _, axis, width in _list_widths(setup) if axis == "tp"]

    def fits(tp: int) -> bool:
        return all(size % tp == 0 for size in (heads, *widths)) and (not groups or _fits_groups(groups, tp))

    return suggest("tp", setup.layout.tp, fits, largest=heads)


def _fits_groups(groups: int, tp: int) -> bool:
    return groups % tp == 0 or tp % groups == 0


@rule()
def feed_forward_divides(setup: Setup) -> Iterator[str]:
    """Each tensor-parallel rank holds an equal part of every feed-forward layer."""
    for name, axis, width in _list_widths(setup):
        if width % (ranks := getattr(setup.layout, axis)):
            nearest = _suggest_tp(setup) if axis == "tp" else suggest("etp", ranks, divides(width), largest=width)
            yield f"{name} = {width} is not a multiple of {axis} = {ranks}: choose {nearest}, or another {name}"


def _list_widths(setup: Setup) -> Iterator[tuple[str, str, int]]:
    """Yield the widths of the feed-forward layers, each with its field and the axis that splits it."""
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
        width = getattr(config, name)
        if applies and width is not None:
            yield name, axis, width


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
        nearest = suggest("ep", ep, divides(experts), largest=experts)
        yield f"num_moe_experts = {experts} is not a multiple of ep = {ep}: choose {nearest}"


@rule()
def layers_divide(setup: Setup) -> Iterator[str]:
    """All stages have the same number of layers unless the configuration assigns layers to stages. The embedding and
    the loss count as layers if the configuration says so.
    """
    config = setup.transformer
    pattern: str | None = getattr(setup.model, "hybrid_layer_pattern", None)
    if assigns_layers(config) or "|" in (pattern or ""):  # | separates the stages of a hybrid model
        return
    counted = {name: getattr(config, field) for name, field in _COUNTED.items()}
    pp, vp = setup.layout.pp, setup.layout.vp
    layers, stages = config.num_layers + sum(counted.values()), pp * vp
    if layers % stages:
        with_ends = " and ".join(name for name, counts in counted.items() if counts)
        splits = ", ".join(_suggest_splits(config.num_layers, layers, pp=pp, vp=vp))
        yield (
            f"num_layers = {config.num_layers}"
            + (f", with {with_ends} {layers}," if with_ends else "")
            + f" does not divide into pp x vp = {pp} x {vp} = {stages} equal stages: "
            + (f"{splits}, or " if splits else "")
            + "assign layers to stages in pipeline_model_parallel_layout"
        )


_COUNTED = {
    "the embedding": "account_for_embedding_in_pipeline_split",
    "the loss": "account_for_loss_in_pipeline_split",
}
"""The fields that make Megatron count something else as a layer."""


def _suggest_splits(num_layers: int, layers: int, *, pp: int, vp: int) -> Iterator[str]:
    """Yield what to change so that the layers divide into stages.

    Args:
        num_layers: The number of layers of the model.
        layers: The same with the embedding and the loss, if they count as layers.
        pp: The pipeline-parallel size.
        vp: The number of virtual stages of a rank.
    """
    embedding, loss = _COUNTED.values()
    for ends, advice in {
        2: f"set {embedding} and {loss} to True",
        1: f"set {embedding} or {loss} to True, the other to False",
        0: f"set {embedding} and {loss} to False",
    }.items():
        if (num_layers + ends) % (pp * vp) == 0:
            yield advice
    if other := suggest("pp", pp, lambda size: layers % (size * vp) == 0, largest=layers):
        yield f"choose {other}" + (f" with vp = {vp}" if vp > 1 else "")
    if vp > 1 and (other := suggest("vp", vp, lambda size: layers % (pp * size) == 0, largest=layers)):
        yield f"choose {other} with pp = {pp}"


@rule(observed_in=MEGATRON, no_reproduction=CONSTRUCTOR)
def sequences_without_tensor_parallelism(setup: Setup) -> Iterator[str]:
    """Sequence parallelism splits activations that tensor-parallel ranks would otherwise replicate."""
    if setup.transformer.sequence_parallel and setup.layout.tp == 1:
        yield "sequence_parallel needs tensor parallelism, got tp = 1: set sequence_parallel = False, or tp > 1"


@rule(observed_in=MEGATRON, no_reproduction=CONSTRUCTOR)
def expert_parallelism_without_experts(setup: Setup) -> Iterator[str]:
    """A model without experts has nothing that expert parallelism could split."""
    if setup.layout.ep > 1 and setup.transformer.num_moe_experts is None:
        yield f"ep = {setup.layout.ep}, but the model has no experts: set ep = 1, or num_moe_experts"


@rule(observed_in=MEGATRON, no_reproduction=CONSTRUCTOR)
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
