"""Cases of the rules about Megatron-FSDP."""

from __future__ import annotations

from preflight_cases.ddp import FP8
from preflight_cases.setting import EXPERT_PARALLEL, EXPERTS, PIPELINE, Case, Setting, megatron_fsdp

CASES: dict[str, Case] = {
    "megatron-fsdp-pipeline": Case(
        refused=Setting(sizes=PIPELINE, **megatron_fsdp()), advised=Setting(**megatron_fsdp()), error="EinopsError"
    ),
    "megatron-fsdp-distributed-optimizer": Case(
        refused=Setting(**megatron_fsdp(use_distributed_optimizer=False)), advised=Setting(**megatron_fsdp())
    ),
    "megatron-fsdp-fp16": Case(
        refused=Setting(**megatron_fsdp(), transformer={"fp16": True}),
        advised=Setting(**megatron_fsdp(), transformer={"bf16": True}),
        error="AttributeError: 'NoneType' object has no attribute 'data'",
    ),
    "megatron-fsdp-average": Case(
        refused=Setting(**megatron_fsdp(average_in_collective=True)),
        advised=Setting(**megatron_fsdp()),
        error="AttributeError: 'NoneType' object has no attribute 'size'",
    ),
    "megatron-fsdp-single-experts": Case(
        refused=Setting(**EXPERT_PARALLEL, **megatron_fsdp()),
        advised=Setting(transformer=EXPERTS, **megatron_fsdp()),
    ),
    "megatron-fsdp-strategy": Case(
        refused=Setting(**megatron_fsdp(data_parallel_sharding_strategy="full")),
        advised=Setting(**megatron_fsdp()),
        error="AssertionError",
    ),
    "megatron-fsdp-unsharded-experts": Case(
        refused=Setting(**EXPERT_PARALLEL, **megatron_fsdp(data_parallel_sharding_strategy="no_shard")),
        advised=Setting(**EXPERT_PARALLEL, **megatron_fsdp(data_parallel_sharding_strategy="optim")),
        world_size=4,
    ),
    "megatron-fsdp-instances": Case(
        refused=Setting(
            **megatron_fsdp(data_parallel_sharding_strategy="optim", num_distributed_optimizer_instances=2)
        ),
        advised=Setting(**megatron_fsdp(num_distributed_optimizer_instances=2)),
        world_size=4,
    ),
    "megatron-fsdp-outer-sharding": Case(
        refused=Setting(**megatron_fsdp(outer_dp_sharding_strategy="optim", num_distributed_optimizer_instances=2)),
        advised=Setting(**megatron_fsdp(num_distributed_optimizer_instances=2)),
        world_size=4,
    ),
}

NO_REPRODUCTION: dict[str, Case] = {
    "megatron-fsdp-grouped-parameters": Case(
        refused=Setting(**megatron_fsdp(), assigned={"moe_single_grouped_weight": True}),
        advised=Setting(**megatron_fsdp()),
    ),
    "megatron-fsdp-quantized-parameters": Case(
        refused=Setting(
            transformer=FP8, **megatron_fsdp(fp8_param_gather=True, data_parallel_sharding_strategy="optim_grads")
        ),
        advised=Setting(transformer=FP8, **megatron_fsdp(fp8_param_gather=True)),
    ),
}
