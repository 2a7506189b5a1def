"""What is known to fail late, to hang or to train silently wrong, refused before anything is built.

A rule looks at a configuration, a layout and the build options, and returns what is wrong and what to set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from bridge.dist.documents import CONFIG_FIELDS
from bridge.dist.errors import PreflightError
from bridge.dist.layout import Layout, says_how_to_split
from bridge.dist.options import BuildOptions, Wrapper

Rule = Callable[[TransformerConfig, Layout, BuildOptions], Iterator[str]]


def check(config: TransformerConfig, layout: Layout, options: BuildOptions) -> None:
    """Check a configuration against a layout.

    Raises:
        PreflightError: With every rule that is broken.
    """
    problems = [problem for rule in RULES for problem in rule(config, layout, options)]
    if problems:
        raise PreflightError(problems)


def check_build(config: TransformerConfig, pg_collection: ProcessGroupCollection, options: BuildOptions) -> None:
    """Check a configuration against the process groups that it is about to be built on.

    Raises:
        PreflightError: With every rule that is broken.
    """
    check(config, _layout_of_groups(config, pg_collection), options)


def _layout_of_groups(config: TransformerConfig, pg_collection: ProcessGroupCollection) -> Layout:
    return Layout(
        tp=pg_collection.tp.size(),
        pp=pg_collection.pp.size(),
        vp=config.virtual_pipeline_model_parallel_size or 1,
        cp=pg_collection.cp.size(),
        ep=pg_collection.ep.size() if hasattr(pg_collection, "ep") else 1,
        etp=pg_collection.expt_tp.size() if hasattr(pg_collection, "expt_tp") else None,
        dp=pg_collection.dp.size(),
    )


def _sizes_agree(config: TransformerConfig, layout: Layout, _: BuildOptions) -> Iterator[str]:
    for name in ("tp", "pp", "cp", "ep"):
        wanted, there = getattr(config, CONFIG_FIELDS[name]), getattr(layout, name)
        if wanted != there:
            yield (
                f"{CONFIG_FIELDS[name]} is {wanted} but the {name} process group has {there} rank(s): "
                f"set it to {there}, or create the groups for {wanted}"
            )


def _heads_divide(config: TransformerConfig, layout: Layout, _: BuildOptions) -> Iterator[str]:
    if config.num_attention_heads % layout.tp:
        yield (
            f"num_attention_heads = {config.num_attention_heads} is not a multiple of tp = {layout.tp}: "
            "each tensor-parallel rank holds whole heads, choose a tp that divides them"
        )


def _layers_divide(config: TransformerConfig, layout: Layout, _: BuildOptions) -> Iterator[str]:
    if says_how_to_split(config):
        return
    vp = layout.vp if layout.pp > 1 else 1
    chunks = layout.pp * vp
    if config.num_layers % chunks:
        yield (
            f"num_layers = {config.num_layers} does not divide into pp x vp = {layout.pp} x {vp} = {chunks} "
            "equal stages: change pp or vp, or say how to split in pipeline_model_parallel_layout"
        )


def _interleaving_on_two_ranks(config: TransformerConfig, layout: Layout, _: BuildOptions) -> Iterator[str]:
    # Seen in megatron-core 0.19.2: with two pipeline ranks the previous and the next one are the same, and batched
    # sends and receives of different chunks are matched with each other: gradients are wrong, without an error.
    if layout.pp == 2 and layout.vp > 1 and config.batch_p2p_comm:
        yield (
            "a virtual pipeline on pp = 2 computes wrong gradients with batch_p2p_comm: "
            "set batch_p2p_comm = False and overlap_p2p_comm = True, or use pp > 2"
        )


def _pipeline_dtype(config: TransformerConfig, layout: Layout, _: BuildOptions) -> Iterator[str]:
    # Seen in megatron-core 0.19.2: the receiving stage allocates pipeline_dtype, whatever the sending one sends.
    if config.fp32_residual_connection:
        sent = torch.float32
    else:
        sent = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else config.params_dtype
    if layout.pp > 1 and config.pipeline_dtype != sent:
        yield (
            f"pipeline_dtype is {config.pipeline_dtype}, but the stages of this model send {sent}: "
            f"set pipeline_dtype to {sent}"
        )


def _torch_fsdp2(config: TransformerConfig, layout: Layout, options: BuildOptions) -> Iterator[str]:
    if options.wrapper is not Wrapper.TORCH_FSDP2:
        return
    if layout.pp > 1:
        yield "torch FSDP2 does not work with pipeline parallelism: set pp = 1, or wrap with ddp or megatron-fsdp"
    if layout.ep > 1:
        # Seen in megatron-core 0.19.2: experts are sharded over ranks that hold other experts.
        yield "torch FSDP2 computes wrong losses with expert parallelism: set ep = 1, or wrap with ddp"


def _megatron_fsdp(config: TransformerConfig, layout: Layout, options: BuildOptions) -> Iterator[str]:
    if options.wrapper is not Wrapper.MEGATRON_FSDP or options.ddp_config is None:
        return
    if options.ddp_config.average_in_collective and config.num_moe_experts is None:
        # Seen in megatron-core 0.19.2: an AttributeError about expert groups, in the middle of the first step.
        yield "Megatron-FSDP fails with average_in_collective in a model without experts: set it to False"
    assert layout.etp is not None
    expert_dp = layout.tp * layout.cp * layout.dp // (layout.etp * layout.ep)
    if layout.ep > 1 and expert_dp == 1:
        # Seen in megatron-core 0.19.2, with several microbatches.
        yield (
            "Megatron-FSDP computes wrong gradients when each expert lives on one rank only (expert data parallelism "
            "of 1): raise dp, lower ep, or wrap with ddp"
        )


RULES: tuple[Rule, ...] = (
    _sizes_agree,
    _heads_divide,
    _layers_divide,
    _interleaving_on_two_ranks,
    _pipeline_dtype,
    _torch_fsdp2,
    _megatron_fsdp,
)
