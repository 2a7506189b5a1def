"""Rules about Megatron's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.dist.checks.preflight import MEGATRON, Rule, Setup, rule
from bridge.dist.wrapper import Wrapper


@rule(observed_in=MEGATRON)
def parameter_gather_without_distributed_optimizer(setup: Setup) -> Iterator[str]:
    """Without a distributed optimizer there is nothing to gather: the first forward pass raises a TypeError."""
    gathers = setup.is_wrapped_with(Wrapper.DDP) and setup.ddp.overlap_param_gather
    if gathers and not (setup.shards_optimizer or setup.options.use_layer_wise_distributed_optimizer):
        yield (
            "overlap_param_gather needs a distributed optimizer: set use_distributed_optimizer = True, or "
            "overlap_param_gather = False"
        )


@rule(observed_in=MEGATRON)
def instances_without_distributed_optimizer(setup: Setup) -> Iterator[str]:
    """Wrapping raises a bare AssertionError, after the whole model was built."""
    several = setup.is_wrapped_with(Wrapper.DDP) and setup.ddp.num_distributed_optimizer_instances > 1
    if several and not setup.shards_optimizer:
        yield (
            "num_distributed_optimizer_instances > 1 needs a distributed optimizer: "
            "set use_distributed_optimizer = True, or num_distributed_optimizer_instances = 1"
        )


@rule(observed_in=MEGATRON)
def average_of_per_token_loss(setup: Setup) -> Iterator[str]:
    """Wrapping raises an AssertionError, after the whole model was built."""
    wrapped = setup.is_wrapped_with(Wrapper.DDP)
    if wrapped and setup.ddp.average_in_collective and setup.transformer.calculate_per_token_loss:
        yield "DDP cannot average gradients of a per-token loss: set average_in_collective = False"


@rule(observed_in=MEGATRON)
def fp32_reduce_scatter(setup: Setup) -> Iterator[str]:
    """Wrapping or the first step raises a bare AssertionError."""
    wrapped = setup.is_wrapped_with(Wrapper.DDP) and setup.shards_optimizer
    if not (wrapped and setup.ddp.reduce_scatter_with_fp32_accumulation):
        return
    if setup.ddp.average_in_collective:
        yield "reduce_scatter_with_fp32_accumulation supports sums only: set average_in_collective = False"
    if setup.ddp.num_distributed_optimizer_instances > 1:
        yield (
            "reduce_scatter_with_fp32_accumulation supports only one optimizer instance: "
            "set it to False, or num_distributed_optimizer_instances = 1"
        )


@rule(observed_in=MEGATRON)
def custom_fsdp(setup: Setup) -> Iterator[str]:
    """Megatron does not read this former name of ``use_megatron_fsdp``: stages are wrapped with DDP."""
    if setup.is_wrapped and setup.ddp.use_custom_fsdp and not setup.is_wrapped_with(Wrapper.MEGATRON_FSDP):
        yield "use_custom_fsdp is a former name without effect: set use_megatron_fsdp instead"


RULES: tuple[Rule, ...] = (
    parameter_gather_without_distributed_optimizer,
    instances_without_distributed_optimizer,
    average_of_per_token_loss,
    fp32_reduce_scatter,
    custom_fsdp,
)
