"""Cases of the rules about torch FSDP2."""

from __future__ import annotations

from preflight_cases.setting import EXPERT_PARALLEL, EXPERTS, TENSOR_PARALLEL, TORCH_FSDP2, Case, Setting

SPLIT = EXPERTS | {"sequence_parallel": True}

CASES: dict[str, Case] = {
    "torch-fsdp2-experts": Case(
        refused=Setting(**EXPERT_PARALLEL, flags=TORCH_FSDP2),
        advised=Setting(**EXPERT_PARALLEL),
        needs_own_processes=True,
    ),
    "torch-fsdp2-expert-tensor-parallelism": Case(
        refused=Setting(
            sizes=TENSOR_PARALLEL, transformer=SPLIT | {"expert_tensor_parallel_size": 1}, flags=TORCH_FSDP2
        ),
        advised=Setting(sizes=TENSOR_PARALLEL, transformer=SPLIT, flags=TORCH_FSDP2),
        world_size=4,
    ),
    "torch-fsdp2-tied-embeddings": Case(
        refused=Setting(model={"share_embeddings_and_output_weights": True}, flags=TORCH_FSDP2),
        advised=Setting(flags=TORCH_FSDP2),
        error="mixed torch.Tensor and DTensor",
    ),
    "torch-fsdp2-distributed-optimizer": Case(
        refused=Setting(ddp={"use_distributed_optimizer": True}, flags=TORCH_FSDP2),
        advised=Setting(flags=TORCH_FSDP2),
        error="TypeError: 'method' object is not iterable",
    ),
}

NO_REPRODUCTION: dict[str, Case] = {
    "torch-fsdp2-fused-gradients": Case(
        refused=Setting(transformer={"gradient_accumulation_fusion": True}, flags=TORCH_FSDP2),
        advised=Setting(flags=TORCH_FSDP2),
    ),
    "torch-fsdp2-quantized-parameters": Case(
        refused=Setting(transformer={"fp8": "hybrid", "fp8_param": True}, flags=TORCH_FSDP2),
        advised=Setting(transformer={"fp8": "hybrid"}, flags=TORCH_FSDP2),
    ),
}
