"""The pre-flight rules of the families of models. Importing them imports no torch.

Each tuple is declared for its builder in the entry-point group ``bridge.rules``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bridge.config.schema import hybrid_pattern
from bridge.dist.checks.preflight import MEGATRON, Rule, Setup, rule
from bridge.dist.wrapper import Wrapper
from bridge.models.common.vocab import padded_vocab_size
from bridge.models.errors import ModelConfigError
from bridge.models.mamba.pattern import staged

MODELOPT = "nvidia-modelopt 0.47"
"""The version that the rules about ModelOpt were seen in."""

_SHOWN = "it takes a checkpoint of a quantised model: tests/test_modelopt.py shows it"
_VALIDATED = "the configuration's own validate refuses it too"


@rule(not_shown=_VALIDATED)
def vocabulary_divides(setup: Setup) -> Iterator[str]:
    """Each tensor-parallel rank holds an equal part of the embedding."""
    if (problem := vocabulary_problem(setup.model, setup.layout.tp)) is not None:
        yield problem


def vocabulary_problem(model: Any, tp: int) -> str | None:
    """Say what is wrong with the vocabulary of a model that ``tp`` ranks share; None if nothing is."""
    if model.vocab_size is None:
        return "vocab_size is not set: give the number of tokens of the tokenizer"
    if padded_vocab_size(model, tp) % tp:
        return (
            f"vocab_size {model.vocab_size} does not split over tensor_model_parallel_size {tp}: "
            "set should_pad_vocab to true"
        )
    return None


@rule(seen=MEGATRON, not_shown=_VALIDATED)
def predictions_in_a_pipeline(setup: Setup) -> Iterator[str]:
    """The last stage's copy of the position embedding is trained on its own."""
    if (problem := prediction_problem(setup.model, setup.layout.pp)) is not None:
        yield problem


def prediction_problem(model: Any, pp: int) -> str | None:
    """Say what is wrong with multi-token prediction in a pipeline of ``pp`` ranks; None if nothing is."""
    if model.transformer.mtp_num_layers and pp > 1 and model.position_embedding_type == "learned_absolute":
        return (
            "multi-token prediction trains wrong with learned_absolute positions in a pipeline: "
            "set position_embedding_type to rope, or transformer.pipeline_model_parallel_size to 1"
        )
    return None


@rule(seen=MODELOPT, not_shown=_SHOWN)
def modelopt_virtual_pipeline(setup: Setup) -> Iterator[str]:
    """ModelOpt keeps the state of one stage a rank: a ValueError in place of a checkpoint."""
    if _restores(setup) and setup.has_virtual_pipeline:
        yield "a ModelOpt state is of one stage a rank, without a virtual pipeline: set vp = 1"


@rule(seen=MODELOPT, not_shown=_SHOWN)
def modelopt_meta_device(setup: Setup) -> Iterator[str]:
    """What is restored before wrapping has no memory on the meta device: an error about copying out of it."""
    if _restores(setup) and setup.transformer.init_model_with_meta_device:
        yield "what is restored needs memory, on the meta device there is none: set init_model_with_meta_device = False"


@rule(seen=MODELOPT, not_shown=_SHOWN)
def modelopt_experts(setup: Setup) -> Iterator[str]:
    """A ValueError when the experts are converted."""
    if _restores(setup) and setup.transformer.num_moe_experts and setup.layout.ep > 1 and setup.layout.tp > 1:
        yield "ModelOpt quantises experts under expert or tensor parallelism, not both: set ep = 1 or tp = 1"


def _restores(setup: Setup) -> bool:
    return setup.model is not None and setup.model.restore_modelopt_state


@rule(not_shown=_VALIDATED)
def hybrid_stages(setup: Setup) -> Iterator[str]:
    """The layers of a hybrid model divide over the stages of a pipeline as its pattern says, or equally."""
    try:
        pattern_of_stages(setup.model, setup.layout.pp * (setup.layout.vp if setup.has_virtual_pipeline else 1))
    except ModelConfigError as error:
        yield str(error)


def pattern_of_stages(model: Any, stages: int) -> str:
    """Return the pattern of a hybrid model with a border after each of so many stages but the last.

    Raises:
        ModelConfigError: Other fields split the model, or the pattern does not divide so.
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
            f"a hybrid model is not split by transformer.{' and '.join(uneven)}: "
            "put | between the layers in hybrid_layer_pattern where stages shall end"
        )
    return staged(layer_pattern(model), stages)


def layer_pattern(model: Any) -> str:
    """Return the kind of each layer of a hybrid model: its pattern, or Mamba layers alone."""
    pattern: str | None = model.hybrid_layer_pattern
    return hybrid_pattern.MAMBA * model.transformer.num_layers if pattern is None else pattern


def _has_mamba_layers(model: Any) -> bool:
    return hybrid_pattern.MAMBA in layer_pattern(model)


def _mamba_heads(transformer: Any) -> int:
    """The heads of a Mamba layer: as many as given, or as twice the hidden size holds."""
    heads: int = transformer.mamba_num_heads or 2 * transformer.hidden_size // transformer.mamba_head_dim
    return heads


@rule()
def mamba_heads_divide(setup: Setup) -> Iterator[str]:
    """Each rank of tensor parallelism holds whole heads and groups of a Mamba layer, and context parallelism shares
    them out again.
    """
    if not _has_mamba_layers(setup.model):
        return
    tp, cp = setup.layout.tp, setup.layout.cp
    heads, groups = _mamba_heads(setup.transformer), setup.transformer.mamba_num_groups
    if heads % (tp * cp):
        yield f"a Mamba layer has {heads} heads, not a multiple of tp x cp = {tp} x {cp}: choose others"
    if groups % tp:
        yield f"mamba_num_groups = {groups} is not a multiple of tp = {tp}: choose a tp that divides it"
    elif (groups // tp) % cp and cp % (groups // tp):
        yield (
            f"mamba_num_groups = {groups} on tp = {tp} is {groups // tp} a rank, neither a multiple nor a divisor of "
            f"cp = {cp}: choose another cp"
        )


@rule(seen=MEGATRON)
def mamba_params_dtype(setup: Setup) -> Iterator[str]:
    """A Mamba layer casts its input to ``params_dtype``, whatever its weights were cast to: an error about mixed types
    in the first forward pass.
    """
    config = setup.transformer
    half = "torch.bfloat16" if config.bf16 else "torch.float16" if config.fp16 else None
    if half is not None and str(config.params_dtype) != half:
        yield f"params_dtype is {config.params_dtype}, but Mamba layers compute in {half}: set params_dtype to {half}"


@rule(seen=MEGATRON, not_shown="it needs Transformer Engine")
def mamba_offloading(setup: Setup) -> Iterator[str]:
    """A stack of hybrid layers offloads nothing, without a word of it: Megatron's transformer block does."""
    if setup.transformer.cpu_offloading:
        yield "a hybrid model does not offload whole layers: set cpu_offloading = False"


@rule(seen=MEGATRON)
def t5_pipeline(setup: Setup) -> Iterator[str]:
    """The schedules know nothing of where the encoder ends and the decoder starts, and send one tensor only."""
    if setup.layout.pp > 1:
        yield "T5 cannot be split into pipeline stages: set pp = 1"


@rule(seen=MEGATRON)
def t5_context_parallelism(setup: Setup) -> Iterator[str]:
    """Each rank counts positions from zero in its part of a sequence, and cross attention sees its own part alone."""
    if setup.layout.cp > 1:
        yield "T5 cannot split sequences over context-parallel ranks: set cp = 1"


@rule()
def t5_encoder_divides(setup: Setup) -> Iterator[str]:
    """Each tensor-parallel rank holds whole heads of the encoder, and an equal part of its feed-forward layers."""
    tp = setup.layout.tp
    for name in ("encoder_num_attention_heads", "encoder_ffn_hidden_size"):
        size: int | None = getattr(setup.model, name)
        if size is not None and size % tp:
            yield f"{name} = {size} is not a multiple of tp = {tp}: choose a multiple, or another tp"


@rule(seen=MEGATRON)
def t5_torch_fsdp2_learned_positions(setup: Setup) -> Iterator[str]:
    """The model names its embedding of positions twice, and it is sharded twice: a TypeError while wrapping."""
    if setup.is_wrapped_with(Wrapper.TORCH_FSDP2) and _positions(setup) == "learned_absolute":
        yield (
            "torch FSDP2 fails with learned positions in T5: set position_embedding_type to rope or relative, "
            "or wrap with ddp or megatron-fsdp"
        )


@rule(seen=MEGATRON)
def t5_recomputed_relative_positions(setup: Setup) -> Iterator[str]:
    """All layers add one bias, and recomputing a layer goes back through the whole of it: the second time, in the first
    backward pass, is a RuntimeError.
    """
    config = setup.transformer
    attention = config.recompute_granularity == "full" or "core_attn" in (config.recompute_modules or ())
    if _positions(setup) == "relative" and config.recompute_granularity and attention:
        yield (
            "T5 cannot recompute attention with relative positions: set recompute_granularity = None, or selective "
            "without core_attn in recompute_modules, or position_embedding_type = rope"
        )


def _positions(setup: Setup) -> str | None:
    return getattr(setup.model, "position_embedding_type", None)


MODELOPT_RULES: tuple[Rule, ...] = (modelopt_virtual_pipeline, modelopt_meta_device, modelopt_experts)
GPT_RULES: tuple[Rule, ...] = (*MODELOPT_RULES, vocabulary_divides, predictions_in_a_pipeline)
MAMBA_RULES: tuple[Rule, ...] = (
    *MODELOPT_RULES,
    vocabulary_divides,
    hybrid_stages,
    mamba_heads_divide,
    mamba_params_dtype,
    mamba_offloading,
)
T5_RULES: tuple[Rule, ...] = (
    vocabulary_divides,
    t5_pipeline,
    t5_context_parallelism,
    t5_encoder_divides,
    t5_torch_fsdp2_learned_positions,
    t5_recomputed_relative_positions,
)
