"""Cases of the rules about sizes."""

from __future__ import annotations

from preflight_cases.setting import EXPERT_PARALLEL, EXPERTS, PIPELINE, TENSOR_PARALLEL, Case, Setting

CASES: dict[str, Case] = {
    "groups-fit-configuration": Case(
        # Each stage builds all layers, so the model has twice as many.
        refused=Setting(sizes=PIPELINE, assigned={"pipeline_model_parallel_size": 1}),
        advised=Setting(sizes=PIPELINE),
        error="pipeline stages have different layers of the same name",
    ),
    "values-fit": Case(
        refused=Setting(assigned={"num_query_groups": 3}),
        advised=Setting(assigned={"num_query_groups": 2}),
        error="must divide num_attention_heads = 4, got 3",
    ),
    "heads-divide": Case(
        refused=Setting(sizes={"tp": 2}, assigned={"num_attention_heads": 3, "num_query_groups": 1}),
        advised=Setting(sizes={"tp": 2}),
        error="3 is not divisible by 2",
    ),
    "feed-forward-divides": Case(
        refused=Setting(sizes={"tp": 2}, transformer={"ffn_hidden_size": 33}),
        advised=Setting(sizes={"tp": 2}, transformer={"ffn_hidden_size": 34}),
        error="33 is not divisible by 2",
    ),
    "experts-divide": Case(
        refused=Setting(sizes={"ep": 2}, transformer=EXPERTS | {"num_moe_experts": 3}),
        advised=Setting(**EXPERT_PARALLEL),
        error="AssertionError",
    ),
    "layers-divide": Case(
        refused=Setting(sizes=PIPELINE, transformer={"num_layers": 3}),
        advised=Setting(sizes=PIPELINE),
        error="num_layers 3 is not divisible by 2 chunks",
    ),
}

NO_REPRODUCTION: dict[str, Case] = {
    "sequences-without-tensor-parallelism": Case(
        refused=Setting(assigned={"sequence_parallel": True}),
        advised=Setting(sizes=TENSOR_PARALLEL, transformer={"sequence_parallel": True}),
    ),
    "expert-parallelism-without-experts": Case(
        refused=Setting(
            sizes={"ep": 2}, assigned={"num_moe_experts": None, "moe_ffn_hidden_size": None}, transformer=EXPERTS
        ),
        advised=Setting(sizes={"ep": 2}, transformer=EXPERTS),
    ),
    "biases-of-split-experts": Case(
        refused=Setting(
            sizes={"tp": 2}, transformer=EXPERTS | {"sequence_parallel": True}, assigned={"add_bias_linear": True}
        ),
        advised=Setting(sizes={"tp": 2}, transformer=EXPERTS | {"sequence_parallel": True}),
    ),
}
