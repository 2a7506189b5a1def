"""Jobs that cannot be planned, and faults of wrappers on the meta device that plans work around."""

from __future__ import annotations

import pytest
from planned_jobs import plan_preset

from bridge.config import BridgeError
from bridge.dist.errors import PlanError
from bridge.dist.wrapper import Wrapper


@pytest.mark.parametrize(
    ("preset", "sizes", "world_size", "says"),
    [
        ("tiny", {"tp": 3}, 3, r"num_attention_heads \(4\) must be a multiple of tensor_model_parallel_size \(3\)"),
        ("moe-tiny", {"ep": 3}, 3, "num_moe_experts = 4 is not a multiple of ep = 3"),
        ("tiny", {"tp": 2}, 3, "3"),
        ("t5-tiny", {"pp": 2}, 2, "T5 cannot be split into pipeline stages"),
    ],
)
def test_impossible_layouts_are_refused(preset: str, sizes: dict[str, int], world_size: int, says: str) -> None:
    with pytest.raises(BridgeError, match=says):
        plan_preset(preset, sizes, world_size=world_size)


def test_jobs_that_cannot_be_planned_are_refused() -> None:
    with pytest.raises(PlanError, match="set it to alltoall"):
        plan_preset("moe-tiny", {}, "transformer.moe_token_dispatcher_type=allgather", world_size=1)
    with pytest.raises(PlanError, match="plans are for up to 1,048,576 GPUs, got 1,000,000,000: choose fewer"):
        plan_preset("tiny", {}, world_size=10**9)


@pytest.mark.parametrize(
    ("wrapper", "name", "error"),
    [
        (Wrapper.MEGATRON_FSDP, "_init_dist_index", NotImplementedError),
        (Wrapper.MEGATRON_FSDP, "_init_each_parameter_group_buffers", AssertionError),
        (Wrapper.TORCH_FSDP2, "_validate_no_meta_params", RuntimeError),
    ],
)
def test_wrappers_still_refuse_the_meta_device(
    wrapper: Wrapper, name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, megatron-core or torch has fixed it: remove the replacement in ``virtual_rank.sharding``."""
    from bridge.dist.plan.virtual_rank import sharding

    kept = [replacement for replacement in sharding._replacements() if replacement.name != name]
    assert len(kept) == len(sharding._replacements()) - 1
    monkeypatch.setattr(sharding, "_replacements", lambda: kept)
    with pytest.raises(error):
        plan_preset("tiny", {}, world_size=2, wrapper=wrapper)
