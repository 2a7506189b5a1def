"""What is known to fail late, to hang or to train silently wrong, refused before anything is built.

One table: a rule looks at a configuration, a layout and the build options, and says what conflicts and what to set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import cleandoc

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from bridge.config import ModelConfig
from bridge.dist.documents import CONFIG_FIELDS
from bridge.dist.errors import PreflightError
from bridge.dist.layout import Layout, says_how_to_split
from bridge.dist.options import BuildOptions, Wrapper

MEGATRON = "megatron-core 0.19.2"
"""The version that the rules about Megatron were seen in."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a rule looks at: a model, how it is split, and how its stages are wrapped."""

    transformer: TransformerConfig
    layout: Layout
    options: BuildOptions
    model: ModelConfig | None = None
    """The whole configuration of the model, where there is one."""

    @property
    def ddp(self) -> DistributedDataParallelConfig:
        """The configuration of the wrapper; without a wrapper, the default one."""
        return self.options.ddp_config or DistributedDataParallelConfig()

    @property
    def expert_dp(self) -> int:
        """Number of ranks that hold copies of the same experts."""
        assert self.layout.etp is not None
        ranks = self.layout.tp * self.layout.cp * self.layout.dp
        return ranks // (self.layout.etp * self.layout.ep)

    @property
    def has_virtual_pipeline(self) -> bool:
        """Whether a rank holds several stages; a pipeline of one rank is not divided further."""
        return self.layout.pp > 1 and self.layout.vp > 1

    def is_wrapped_with(self, *wrappers: Wrapper) -> bool:
        """Whether the wrapper is one of these."""
        return self.options.wrapper in wrappers


Problems = Callable[[Setup], Iterator[str]]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One thing that is known not to work.

    ``name`` is short and stays, ``why`` says what happens without the rule, ``seen`` in which version (None: it follows
    by arithmetic), and ``problems`` yields what conflicts in a setup, and what to set. ``not_shown`` says why no test
    shows what the rule prevents, if none does.
    """

    name: str
    why: str
    problems: Problems
    seen: str | None = None
    not_shown: str | None = None


def rule(*, seen: str | None = None, not_shown: str | None = None) -> Callable[[Problems], Rule]:
    """Make a rule of a function: its name with dashes is the rule's, its docstring says why."""

    def made(problems: Problems) -> Rule:
        return Rule(
            name=problems.__name__.replace("_", "-"),
            why=cleandoc(problems.__doc__ or ""),
            problems=problems,
            seen=seen,
            not_shown=not_shown,
        )

    return made


def check(setup: Setup, rules: Sequence[Rule] = ()) -> None:
    """Check a setup against the table, and against further rules, of its model's family.

    Raises:
        PreflightError: With every problem found, each with the name of its rule.
    """
    problems = [f"{problem} [{rule.name}]" for rule in (*RULES, *rules) for problem in rule.problems(setup)]
    if problems:
        raise PreflightError(problems)


def layout_of_groups(config: TransformerConfig, pg_collection: ProcessGroupCollection) -> Layout:
    """Return the layout of process groups; the virtual pipeline, which has no group, is the configuration's."""
    return Layout(
        tp=pg_collection.tp.size(),
        pp=pg_collection.pp.size(),
        vp=config.virtual_pipeline_model_parallel_size or 1,
        cp=pg_collection.cp.size(),
        ep=pg_collection.ep.size() if hasattr(pg_collection, "ep") else 1,
        etp=pg_collection.expt_tp.size() if hasattr(pg_collection, "expt_tp") else None,
        dp=pg_collection.dp.size(),
    )


# --- Sizes


@rule()
def groups_fit_configuration(setup: Setup) -> Iterator[str]:
    """Layers are cut by the process groups in some places and by the configuration in others."""
    for name in ("tp", "pp", "cp", "ep"):
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
def layers_divide(setup: Setup) -> Iterator[str]:
    """Stages are equal unless the configuration says how to split."""
    if says_how_to_split(setup.transformer):
        return
    pp, vp = setup.layout.pp, setup.layout.vp if setup.has_virtual_pipeline else 1
    if setup.transformer.num_layers % (pp * vp):
        yield (
            f"num_layers = {setup.transformer.num_layers} does not divide into pp x vp = {pp} x {vp} = {pp * vp} "
            "equal stages: change pp or vp, or say how to split in pipeline_model_parallel_layout"
        )


# --- Pipelines


@rule(seen=MEGATRON)
def interleaving_on_two_ranks(setup: Setup) -> Iterator[str]:
    """With two pipeline ranks the previous and the next one are the same, and batched sends and receives of different
    chunks are matched with each other: gradients are wrong, without an error.
    """
    if setup.has_virtual_pipeline and setup.layout.pp == 2 and setup.transformer.batch_p2p_comm:
        yield (
            "a virtual pipeline on pp = 2 computes wrong gradients with batch_p2p_comm: "
            "set batch_p2p_comm = False and overlap_p2p_comm = True, or use pp > 2"
        )


@rule(seen=MEGATRON)
def pipeline_dtype(setup: Setup) -> Iterator[str]:
    """The receiving stage allocates ``pipeline_dtype``, whatever the sending one sends."""
    config = setup.transformer
    if config.fp32_residual_connection:
        sent = torch.float32
    else:
        sent = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else config.params_dtype
    if setup.layout.pp > 1 and config.pipeline_dtype != sent:
        yield (
            f"pipeline_dtype is {config.pipeline_dtype}, but the stages of this model send {sent}: "
            f"set pipeline_dtype to {sent}"
        )


# --- torch FSDP2


@rule(seen=MEGATRON)
def torch_fsdp2_pipeline(setup: Setup) -> Iterator[str]:
    """Megatron-core forbids it: the wrapper knows nothing of the schedule's interleaved passes."""
    if setup.is_wrapped_with(Wrapper.TORCH_FSDP2) and setup.layout.pp > 1:
        yield "torch FSDP2 does not work with pipeline parallelism: set pp = 1, or wrap with ddp or megatron-fsdp"


@rule(seen=MEGATRON)
def torch_fsdp2_experts(setup: Setup) -> Iterator[str]:
    """Experts are sharded over ranks that hold other experts: losses are wrong, without an error."""
    if setup.is_wrapped_with(Wrapper.TORCH_FSDP2) and setup.layout.ep > 1:
        yield "torch FSDP2 computes wrong losses with expert parallelism: set ep = 1, or wrap with ddp"


# --- Megatron-FSDP


@rule(seen=MEGATRON)
def megatron_fsdp_average(setup: Setup) -> Iterator[str]:
    """An AttributeError about expert groups, in the middle of the first step."""
    wrapped = setup.is_wrapped_with(Wrapper.MEGATRON_FSDP)
    if wrapped and setup.ddp.average_in_collective and setup.transformer.num_moe_experts is None:
        yield "Megatron-FSDP fails with average_in_collective in a model without experts: set it to False"


@rule(seen=MEGATRON)
def megatron_fsdp_single_experts(setup: Setup) -> Iterator[str]:
    """With several microbatches the gradients of experts that live on one rank only are wrong, without an error."""
    if setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) and setup.layout.ep > 1 and setup.expert_dp == 1:
        yield (
            "Megatron-FSDP computes wrong gradients when each expert lives on one rank only (expert data parallelism "
            "of 1): raise dp, lower ep, or wrap with ddp"
        )


RULES: tuple[Rule, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Rule))
"""The table, in the order of this file."""
