"""Cases of the rules about process groups and buffers."""

from __future__ import annotations

from megatron.core.transformer.enums import AttnBackend

from bridge.dist.checks.preflight import Environment
from preflight_cases.setting import CONTEXT_PARALLEL, PIPELINE, TENSOR_PARALLEL, Case, Setting

OVERLAP = {"tp_comm_overlap": True, "sequence_parallel": True}
FLASH = {"attention_backend": AttnBackend.flash, "flash_attention_version": 3}

CASES: dict[str, Case] = {
    "weight-shards": Case(
        refused=Setting(transformer={"tensor_parallel_num_weight_shards": 2}), advised=Setting(), is_ignored=True
    ),
    "context-parallelism-in-two-levels": Case(
        refused=Setting(
            sizes=CONTEXT_PARALLEL,
            transformer={"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": [1, 2]},
        ),
        advised=Setting(sizes=CONTEXT_PARALLEL, transformer={"cp_comm_type": "a2a"}),
        is_ignored=True,
    ),
    "hybrid-context-parallelism": Case(
        refused=Setting(transformer={"hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 16}),
        advised=Setting(sizes=CONTEXT_PARALLEL),
        error="IndexError",
    ),
    "pipeline-backend": Case(
        refused=Setting(sizes=PIPELINE, transformer={"pipeline_model_parallel_comm_backend": "ucc"}),
        advised=Setting(sizes=PIPELINE),
        is_ignored=True,
    ),
    "ring-exchange": Case(
        refused=Setting(sizes=PIPELINE, transformer={"use_ring_exchange_p2p": True}),
        advised=Setting(sizes=PIPELINE),
        error="AttributeError: module 'torch.distributed' has no attribute 'ring_exchange'",
    ),
    "tensor-parallel-overlap": Case(
        refused=Setting(sizes=TENSOR_PARALLEL, transformer=OVERLAP),
        advised=Setting(sizes=TENSOR_PARALLEL, transformer=OVERLAP, environment=Environment(has_user_buffers=True)),
        is_ignored=True,
    ),
    "batch-invariant-kernels": Case(
        refused=Setting(transformer=FLASH | {"batch_invariant_mode": True}),
        advised=Setting(
            transformer=FLASH | {"batch_invariant_mode": True}, environment=Environment(is_batch_invariant=True)
        ),
        is_ignored=True,
        needs_own_processes=True,
    ),
}
