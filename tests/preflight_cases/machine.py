"""Cases of the rules about the machine and its libraries."""

from __future__ import annotations

from preflight_cases.setting import TENSOR_PARALLEL, TORCH_FSDP2, Case, Setting, connections, megatron_fsdp, on_gpu

GRAPHS = {"cuda_graph_impl": "full_iteration", "use_te_rng_tracker": True}
OFFLOADING = {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn"]}
DETERMINISTIC = {"NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

CASES: dict[str, Case] = {
    "cuda-graphs": Case(
        refused=Setting(transformer=GRAPHS),
        advised=Setting(transformer=GRAPHS | {"cuda_graph_impl": "none"}),
        is_ignored=True,
    ),
    "nccl-buffers": Case(refused=Setting(ddp={"nccl_ub": True}), advised=Setting(), error="Error: "),
    "megatron-fsdp-fused-division": Case(
        refused=Setting(**megatron_fsdp(gradient_reduce_div_fusion=True)),
        advised=Setting(**megatron_fsdp()),
        error="RuntimeError: Cannot use ReduceOp.PREMUL_SUM",
    ),
}

NO_REPRODUCTION: dict[str, Case] = {
    "connections-of-split-layers": Case(
        refused=Setting(sizes=TENSOR_PARALLEL, environment=connections(8)),
        advised=Setting(sizes=TENSOR_PARALLEL, environment=connections(1)),
    ),
    "connections-of-fsdp": Case(
        refused=Setting(flags=TORCH_FSDP2, environment=connections(1)),
        advised=Setting(flags=TORCH_FSDP2, environment=on_gpu()),
    ),
    "deterministic-libraries": Case(
        refused=Setting(
            transformer={"deterministic_mode": True}, environment=on_gpu(**DETERMINISTIC | {"NCCL_ALGO": "Ring,Tree"})
        ),
        advised=Setting(transformer={"deterministic_mode": True}, environment=on_gpu(**DETERMINISTIC)),
    ),
    "offloaded-weights": Case(
        refused=Setting(transformer=OFFLOADING, environment=on_gpu()),
        advised=Setting(transformer=OFFLOADING, environment=on_gpu(NVTE_CPU_OFFLOAD_V1="1")),
    ),
}
