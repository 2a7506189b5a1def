"""The pre-flight rules of Mamba and hybrid models. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bridge.config.schema import hybrid_pattern
from bridge.config.schema.arithmetic import count_mamba_heads
from bridge.dist.checks.preflight import MEGATRON, Rule, Setup, rule
from bridge.dist.nearest import divides, suggest
from bridge.models.common.rules import LANGUAGE_RULES, VALIDATED
from bridge.models.errors import ModelConfigError
from bridge.models.mamba.pattern import split_pattern
from bridge.models.modelopt.rules import MODELOPT_RULES


@rule(no_reproduction=VALIDATED)
def hybrid_stages(setup: Setup) -> Iterator[str]:
    """The pattern of a hybrid model must match the number of pipeline stages, or its layers must divide equally."""
    try:
        split_model_pattern(setup.model, setup.layout.pp * setup.layout.vp)
    except ModelConfigError as error:
        yield str(error)


def split_model_pattern(model: Any, stages: int) -> str:
    """Return the pattern of a hybrid model with ``|`` between ``stages`` pipeline stages.

    Raises:
        ModelConfigError: Other fields split the model, or the pattern cannot be split that way.
    """
    transformer = model.transformer
    uneven = [
        name
        for name in (
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "pipeline_model_parallel_layout",
        )
        if getattr(transformer, name) is not None
    ]
    if uneven:
        raise ModelConfigError(
            f"hybrid models do not support transformer.{' and '.join(uneven)}: "
            "mark the end of a stage with | in hybrid_layer_pattern instead"
        )
    return split_pattern(layer_pattern(model), stages)


def layer_pattern(model: Any) -> str:
    """Return the kind of each layer of a hybrid model: its pattern, or all Mamba if it has none."""
    pattern: str | None = model.hybrid_layer_pattern
    return hybrid_pattern.MAMBA * model.transformer.num_layers if pattern is None else pattern


def _has_mamba_layers(model: Any) -> bool:
    return hybrid_pattern.MAMBA in layer_pattern(model)


@rule()
def mamba_heads_divide(setup: Setup) -> Iterator[str]:
    """Tensor parallelism splits a Mamba layer by heads and groups, and context parallelism splits each rank's part
    again.
    """
    if not _has_mamba_layers(setup.model):
        return
    tp, cp = setup.layout.tp, setup.layout.cp
    heads, groups = count_mamba_heads(setup.transformer), setup.transformer.mamba_num_groups
    if heads % (tp * cp):
        product = suggest("tp x cp", tp * cp, divides(heads), largest=heads)
        yield f"Mamba layers have {heads} heads, which is not a multiple of tp x cp = {tp} x {cp}: choose {product}"
    if groups % tp:
        nearest = suggest("tp", tp, lambda size: groups % size == 0 == heads % (size * cp), largest=groups)
        yield f"mamba_num_groups = {groups} is not a multiple of tp = {tp}: choose {nearest or 'another cp'}"
    # Context parallelism splits the groups of a rank, or repeats each of them on several ranks.
    elif (groups // tp) % cp and cp % (groups // tp):
        yield (
            f"mamba_num_groups = {groups} with tp = {tp} gives {groups // tp} groups per rank, which is neither a "
            f"multiple nor a divisor of cp = {cp}: choose another cp"
        )


@rule(observed_in=MEGATRON)
def mamba_params_dtype(setup: Setup) -> Iterator[str]:
    """A Mamba layer casts its input to ``params_dtype``, regardless of the dtype of its weights: the first forward pass
    fails with mixed dtypes.
    """
    config = setup.transformer
    half = "torch.bfloat16" if config.bf16 else "torch.float16" if config.fp16 else None
    if half is not None and str(config.params_dtype) != half:
        yield f"params_dtype is {config.params_dtype}, but Mamba layers compute in {half}: set params_dtype to {half}"


@rule(observed_in=MEGATRON, no_reproduction="it needs Transformer Engine")
def mamba_offloading(setup: Setup) -> Iterator[str]:
    """HybridStack silently ignores ``cpu_offloading``, which only TransformerBlock implements."""
    if setup.transformer.cpu_offloading:
        yield "hybrid models do not support CPU offloading of layers: set cpu_offloading = False"


MAMBA_RULES: tuple[Rule, ...] = (
    *MODELOPT_RULES,
    *LANGUAGE_RULES,
    hybrid_stages,
    mamba_heads_divide,
    mamba_params_dtype,
    mamba_offloading,
)
