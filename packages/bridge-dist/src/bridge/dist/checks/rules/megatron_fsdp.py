"""Rules about Megatron-FSDP."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.dist.checks.preflight import MEGATRON, SOURCE, Rule, Setup, rule
from bridge.dist.wrapper import ShardingStrategy, Wrapper


@rule(observed_in=MEGATRON)
def megatron_fsdp_pipeline(setup: Setup) -> Iterator[str]:
    """Its device mesh assumes that the whole world is one pipeline stage: wrapping raises an EinopsError."""
    if setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) and setup.layout.pp > 1:
        yield "Megatron-FSDP does not support pipeline parallelism: set pp = 1, or wrap with ddp"


@rule(observed_in=MEGATRON)
def megatron_fsdp_distributed_optimizer(setup: Setup) -> Iterator[str]:
    """The weights that the model reads are never updated, and each rank clips gradients by its own norm, without an
    error.
    """
    if setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) and not setup.ddp.use_distributed_optimizer:
        yield (
            "Megatron-FSDP trains incorrectly without the distributed optimizer: set use_distributed_optimizer = True, "
            "also in the optimizer's configuration"
        )


@rule(observed_in=MEGATRON)
def megatron_fsdp_fp16(setup: Setup) -> Iterator[str]:
    """The optimizer unscales gradients that a rank's shard may lack: the first step raises an AttributeError."""
    if setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) and setup.transformer.fp16:
        yield "Megatron-FSDP does not support fp16: set bf16 = True and fp16 = False, or wrap with ddp"


@rule(observed_in=MEGATRON, no_reproduction="it needs Transformer Engine")
def megatron_fsdp_grouped_parameters(setup: Setup) -> Iterator[str]:
    """Megatron-FSDP cannot put the storage of Transformer Engine's grouped parameters into its own buffers."""
    names = ("moe_single_grouped_weight", "moe_single_grouped_bias")
    grouped = [name for name in names if getattr(setup.transformer, name)]
    if setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) and grouped:
        yield (
            f"Megatron-FSDP does not support grouped parameters: set {' and '.join(grouped)} to False, or wrap with ddp"
        )


@rule(observed_in=MEGATRON, no_reproduction=SOURCE)
def megatron_fsdp_quantized_parameters(setup: Setup) -> Iterator[str]:
    """Megatron-FSDP quantises updated weights only where it shards them, and has no code for FP4."""
    if not setup.is_wrapped_with(Wrapper.MEGATRON_FSDP):
        return
    strategy, full = setup.ddp.data_parallel_sharding_strategy, ShardingStrategy.OPTIM_GRADS_PARAMS
    if setup.transformer.fp8_param and strategy != full:
        yield (
            f"Megatron-FSDP does not support FP8 parameters with data_parallel_sharding_strategy {strategy}: set the "
            f"strategy to {full}, or fp8_param = False"
        )
    if setup.transformer.fp4_param:
        yield "Megatron-FSDP does not support FP4 parameters: set fp4_param = False, or wrap with ddp"


@rule(observed_in=MEGATRON)
def megatron_fsdp_average(setup: Setup) -> Iterator[str]:
    """Wrapping raises an AttributeError about expert groups."""
    wrapped = setup.is_wrapped_with(Wrapper.MEGATRON_FSDP)
    if wrapped and setup.ddp.average_in_collective and setup.transformer.num_moe_experts is None:
        yield "Megatron-FSDP supports average_in_collective only in models with experts: set it to False"


@rule(observed_in=MEGATRON)
def megatron_fsdp_single_experts(setup: Setup) -> Iterator[str]:
    """With several microbatches, the gradients of experts that exist on one rank only are wrong, without an error."""
    if setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) and setup.layout.ep > 1 and setup.layout.expert_dp == 1:
        yield (
            "Megatron-FSDP computes wrong gradients if each expert exists on one rank only (expert data parallelism "
            "of 1): raise dp, lower ep, or wrap with ddp"
        )


@rule(observed_in=MEGATRON)
def megatron_fsdp_strategy(setup: Setup) -> Iterator[str]:
    """Wrapping raises a bare AssertionError."""
    if not setup.is_wrapped_with(Wrapper.MEGATRON_FSDP):
        return
    strategy = setup.ddp.data_parallel_sharding_strategy
    if strategy not in list(ShardingStrategy):
        yield f"data_parallel_sharding_strategy {strategy!r} is unknown: choose one of {', '.join(ShardingStrategy)}"


@rule(observed_in=MEGATRON)
def megatron_fsdp_unsharded_experts(setup: Setup) -> Iterator[str]:
    """Gradient norms, and with them clipping, are wrong, without an error."""
    if not setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) or setup.transformer.num_moe_experts is None:
        return
    layout, replicas = setup.layout, setup.layout.dp * setup.layout.cp
    if setup.ddp.data_parallel_sharding_strategy == ShardingStrategy.NO_SHARD and layout.expert_dp != replicas:
        yield (
            "Megatron-FSDP computes wrong gradient norms with data_parallel_sharding_strategy no_shard if experts have "
            f"another number of data-parallel ranks ({layout.expert_dp}) than other layers ({replicas}): set the "
            "strategy to optim, optim_grads or optim_grads_params, or wrap with ddp"
        )


@rule(observed_in=MEGATRON)
def megatron_fsdp_instances(setup: Setup) -> Iterator[str]:
    """Gradients are reduced within one optimizer instance only: they are wrong, without an error."""
    if not setup.is_wrapped_with(Wrapper.MEGATRON_FSDP):
        return
    strategy = setup.ddp.data_parallel_sharding_strategy
    if setup.ddp.num_distributed_optimizer_instances > 1 and strategy in ("no_shard", "optim"):
        yield (
            f"Megatron-FSDP computes wrong gradients with num_distributed_optimizer_instances > 1 and "
            f"data_parallel_sharding_strategy {strategy}: set num_distributed_optimizer_instances = 1, or the strategy "
            "to optim_grads or optim_grads_params"
        )


@rule(observed_in=MEGATRON)
def megatron_fsdp_outer_sharding(setup: Setup) -> Iterator[str]:
    """Gradient norms and clipping are wrong, without an error. With one optimizer instance, training fails outright."""
    if not setup.is_wrapped_with(Wrapper.MEGATRON_FSDP):
        return
    if (strategy := setup.ddp.outer_dp_sharding_strategy) != "no_shard":
        yield (
            f"Megatron-FSDP computes wrong gradient norms with outer_dp_sharding_strategy {strategy}: "
            "set it to no_shard"
        )


RULES: tuple[Rule, ...] = (
    megatron_fsdp_pipeline,
    megatron_fsdp_distributed_optimizer,
    megatron_fsdp_fp16,
    megatron_fsdp_grouped_parameters,
    megatron_fsdp_quantized_parameters,
    megatron_fsdp_average,
    megatron_fsdp_single_experts,
    megatron_fsdp_strategy,
    megatron_fsdp_unsharded_experts,
    megatron_fsdp_instances,
    megatron_fsdp_outer_sharding,
)
