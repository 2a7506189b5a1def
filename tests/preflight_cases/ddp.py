"""Cases of the rules about Megatron's DDP."""

from __future__ import annotations

from preflight_cases.setting import Case, Setting, megatron_fsdp

TWO_INSTANCES = {"use_distributed_optimizer": True, "num_distributed_optimizer_instances": 2}

CASES: dict[str, Case] = {
    "parameter-gather-without-distributed-optimizer": Case(
        refused=Setting(ddp={"overlap_param_gather": True, "overlap_grad_reduce": True}),
        advised=Setting(
            ddp={"overlap_param_gather": True, "overlap_grad_reduce": True, "use_distributed_optimizer": True}
        ),
        error="TypeError: 'NoneType' object is not iterable",
    ),
    "instances-without-distributed-optimizer": Case(
        refused=Setting(ddp={"num_distributed_optimizer_instances": 2}),
        advised=Setting(ddp=TWO_INSTANCES),
        error="AssertionError: Partial DistOpt",
    ),
    "average-of-per-token-loss": Case(
        refused=Setting(ddp={"average_in_collective": True}, transformer={"calculate_per_token_loss": True}),
        advised=Setting(transformer={"calculate_per_token_loss": True}),
        error="AssertionError: Cannot average",
    ),
    "fp32-reduce-scatter": Case(
        refused=Setting(ddp=TWO_INSTANCES | {"reduce_scatter_with_fp32_accumulation": True}),
        advised=Setting(ddp={"use_distributed_optimizer": True, "reduce_scatter_with_fp32_accumulation": True}),
        error="AssertionError: RS w/ FP32 accumulation not supported",
    ),
    "custom-fsdp": Case(
        refused=Setting(ddp={"use_custom_fsdp": True}), advised=Setting(**megatron_fsdp()), is_ignored=True
    ),
}

FP8 = {"fp8": "hybrid", "fp8_param": True}
GATHERED = {"use_distributed_optimizer": True, "fp8_param_gather": True}

NO_REPRODUCTION: dict[str, Case] = {
    "quantized-parameters-without-distributed-optimizer": Case(
        refused=Setting(transformer=FP8), advised=Setting(transformer=FP8, ddp=GATHERED)
    ),
    "quantized-parameters-without-gathering": Case(
        refused=Setting(transformer=FP8, ddp={"use_distributed_optimizer": True}),
        advised=Setting(transformer=FP8, ddp=GATHERED),
    ),
    "mxfp8-parameters": Case(
        refused=Setting(transformer=FP8, assigned={"fp8_recipe": "mxfp8"}, ddp=GATHERED),
        advised=Setting(
            transformer=FP8,
            assigned={"fp8_recipe": "mxfp8"},
            ddp=GATHERED | {"reuse_grad_buf_for_mxfp8_param_ag": True},
        ),
    ),
}
