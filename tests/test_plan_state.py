"""A plan restores the process state: later plans and training are not affected."""

from __future__ import annotations

import planned_ranks
from planned_ranks import Job

from bridge.dist.run.pool import launch, start_fork_server
from bridge.dist.wrapper import Wrapper

PREDICTS_TWO = ("position_embedding_type=rope", "transformer.mtp_num_layers=2")
BALANCED = ("transformer.moe_aux_loss_coeff=0.01", "transformer.moe_z_loss_coeff=0.001")
PLANS = [
    Job("tiny", ("position_embedding_type=rope", "transformer.mtp_num_layers=1"), {"pp": 2}, 4, Wrapper.TORCH_FSDP2),
    Job("tiny", (*PREDICTS_TWO, "transformer.attention_backend=unfused"), {"tp": 2}, 2),
    Job(
        "moe-tiny",
        (
            *BALANCED,
            "transformer.moe_shared_expert_intermediate_size=64",
            "transformer.moe_shared_expert_overlap=true",
            "transformer.moe_enable_routing_replay=true",
            "transformer.moe_router_force_biased=-1.0",
        ),
        {"ep": 2},
        2,
    ),
    Job("moe-tiny", BALANCED, {"ep": 2}, 4, Wrapper.MEGATRON_FSDP),
    Job("mla-tiny", ("transformer.recompute_granularity=selective",), {"tp": 2, "pp": 2, "vp": 2}, 4),
    Job("hybrid-tiny", (), {"pp": 2}, 2),
]


TRAINED = Job("moe-tiny", (*BALANCED, *PREDICTS_TWO, "transformer.attention_backend=flash"), {}, 1)


def test_plans_restore_module_state_and_training_after_them_gives_the_same_result() -> None:
    start_fork_server(1)
    alike, changed, trained = launch(planned_ranks.plan_and_train, PLANS, TRAINED, ranks=1)
    assert changed == []
    assert alike == [True] * len(PLANS)
    assert trained == launch(planned_ranks.train, TRAINED, ranks=1)
