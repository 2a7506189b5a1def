"""Rules about Megatron's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.dist.checks.preflight import MEGATRON, SOURCE, Rule, Setup, rule
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


_QUANTIZED = {"fp8_param": "fp8_param_gather", "fp4_param": "fp4_param_gather"}
"""The fields that keep a model's weights in 8 or 4 bits, and those of the wrapper's configuration that go with them."""


@rule(observed_in=MEGATRON, no_reproduction=SOURCE)
def quantized_parameters_without_distributed_optimizer(setup: Setup) -> Iterator[str]:
    """Only the distributed optimizer has code that quantises the weights it has updated. megatron.training refuses the
    others.
    """
    if not setup.is_wrapped_with(Wrapper.DDP):
        return
    if setup.shards_optimizer or setup.options.use_layer_wise_distributed_optimizer:
        return
    for name in _QUANTIZED:
        if getattr(setup.transformer, name):
            yield (
                f"{name} needs a distributed optimizer: set use_distributed_optimizer = True "
                f"(--distributed-optimizer), or {name} = False"
            )


@rule(observed_in=MEGATRON, no_reproduction=SOURCE)
def quantized_parameters_without_gathering(setup: Setup) -> Iterator[str]:
    """The distributed optimizer skips quantised weights unless the wrapper's configuration announces them: they are
    never updated, without an error.
    """
    shards = setup.is_wrapped_with(Wrapper.DDP) and setup.shards_optimizer
    if shards or setup.is_wrapped_with(Wrapper.MEGATRON_FSDP):
        for name, gather in _QUANTIZED.items():
            if getattr(setup.transformer, name) and not getattr(setup.ddp, gather):
                yield f"weights with {name} are not updated: set {gather} = True in the configuration of the wrapper"


@rule(observed_in=MEGATRON, no_reproduction=SOURCE)
def mxfp8_parameters(setup: Setup) -> Iterator[str]:
    """With the distributed optimizer, DDP moves weights into a buffer of its own. Transformer Engine cannot move those
    in MXFP8.
    """
    config = setup.transformer
    is_mxfp8 = config.fp8_param and config.fp8_recipe == "mxfp8"
    buffers = setup.is_wrapped_with(Wrapper.DDP) and setup.ddp.use_distributed_optimizer
    if is_mxfp8 and buffers and not setup.ddp.reuse_grad_buf_for_mxfp8_param_ag:
        yield (
            "DDP with a distributed optimizer cannot move weights in MXFP8: set fp8_param = False, another fp8_recipe, "
            "or reuse_grad_buf_for_mxfp8_param_ag = True in the configurations of the wrapper and of the optimizer"
        )


RULES: tuple[Rule, ...] = (
    parameter_gather_without_distributed_optimizer,
    instances_without_distributed_optimizer,
    average_of_per_token_loss,
    fp32_reduce_scatter,
    custom_fsdp,
    quantized_parameters_without_distributed_optimizer,
    quantized_parameters_without_gathering,
    mxfp8_parameters,
)
