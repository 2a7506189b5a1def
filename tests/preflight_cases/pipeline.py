"""Cases of the rules about pipelines."""

from __future__ import annotations

import torch

from preflight_cases.setting import INTERLEAVED, OVERLAPPED_P2P, PIPELINE, PREDICTING, ROPE, Case, Setting

CASES: dict[str, Case] = {
    "embedding-group": Case(
        refused=Setting(
            sizes=PIPELINE,
            transformer=PREDICTING | {"pipeline_model_parallel_layout": "Ettm|L"},
            model=ROPE,
            embedding_ranks=[0, 1],
        ),
        advised=Setting(
            sizes=PIPELINE,
            transformer=PREDICTING | {"pipeline_model_parallel_layout": "Ettm|L"},
            model=ROPE,
            embedding_ranks=[0],
        ),
    ),
    "interleaving-on-two-ranks": Case(
        refused=Setting(sizes=INTERLEAVED, transformer={"num_layers": 4, "batch_p2p_comm": True}),
        advised=Setting(sizes=INTERLEAVED, transformer=OVERLAPPED_P2P),
    ),
    "interleaving-group-size": Case(
        refused=Setting(sizes=INTERLEAVED, transformer=OVERLAPPED_P2P | {"microbatch_group_size_per_vp_stage": 1}),
        advised=Setting(sizes=INTERLEAVED, transformer=OVERLAPPED_P2P | {"microbatch_group_size_per_vp_stage": 2}),
        error="ValueError: The number of contiguous micro-batches",
    ),
    "overlapped-and-batched-messages": Case(
        refused=Setting(sizes=INTERLEAVED, transformer=OVERLAPPED_P2P | {"batch_p2p_comm": True}),
        advised=Setting(sizes=INTERLEAVED, transformer=OVERLAPPED_P2P),
        error="ValueError: Can not use both",
    ),
    "overlapped-messages-without-interleaving": Case(
        refused=Setting(sizes=PIPELINE, transformer=OVERLAPPED_P2P),
        advised=Setting(sizes=PIPELINE, transformer=OVERLAPPED_P2P | {"overlap_p2p_comm": False}),
        error="ValueError: Non-interleaved",
    ),
    "pipeline-dtype": Case(
        refused=Setting(sizes=PIPELINE, transformer={"pipeline_dtype": torch.bfloat16}),
        advised=Setting(sizes=PIPELINE),
        error="RankError: rank 1 was killed: SIGABRT",
        needs_own_processes=True,
    ),
}

NO_REPRODUCTION: dict[str, Case] = {
    "pipeline-layout": Case(
        refused=Setting(sizes=PIPELINE, assigned={"pipeline_model_parallel_layout": "Et|L"}),
        advised=Setting(sizes=PIPELINE, assigned={"pipeline_model_parallel_layout": "Et|tL"}),
    ),
    "predictions-beside-the-embedding": Case(
        refused=Setting(
            sizes=INTERLEAVED,
            transformer=PREDICTING | OVERLAPPED_P2P | {"pipeline_model_parallel_layout": "Et|tt|tm|L"},
            model=ROPE,
        ),
        advised=Setting(
            sizes=INTERLEAVED,
            transformer=PREDICTING | OVERLAPPED_P2P | {"pipeline_model_parallel_layout": "Et|tt|t|mL"},
            model=ROPE,
        ),
    ),
    "uneven-pipeline": Case(
        refused=Setting(
            sizes=PIPELINE, transformer={"num_layers": 4}, assigned={"num_layers_in_first_pipeline_stage": 5}
        ),
        advised=Setting(sizes=PIPELINE, transformer={"num_layers": 4, "num_layers_in_first_pipeline_stage": 3}),
    ),
}
