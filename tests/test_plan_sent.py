"""The traffic of a rank in a plan."""

from __future__ import annotations

import functools

import pytest
from planned_jobs import plan_preset

from bridge.dist.train.batch import Batch
from bridge.dist.wrapper import Wrapper


@functools.cache
def count_whole(*overrides: str, batch: Batch) -> tuple[int, float]:
    """Return the parameters and FLOPs of the model on one rank."""
    whole = plan_preset("tiny", {}, *overrides, world_size=1, batch=batch)
    return whole.parameters, whole.worst.flops


@pytest.mark.parametrize("wrapper", [Wrapper.DDP, Wrapper.TORCH_FSDP2])
@pytest.mark.parametrize(
    ("stages", "sizes", "hidden_states"),
    [
        ("Ett|tt|mm|L", {"pp": 4}, [1, 2, 4, 3]),
        ("Ettt|tmm|L", {"pp": 3}, [1, 4, 3]),
        ("Et|t|t|t|||mm|L", {"pp": 4, "vp": 2}, [1 + 2, 2 + 2, 2 + 4, 2 + 3]),
        ("Ett|ttmm||L", {"pp": 4}, [1, 4, 6, 3]),
        ("Ett|tt|mmL", {"pp": 3}, [1, 2, 1]),
    ],
)
def test_multi_token_prediction_on_its_own_stage_receives_hidden_states(
    stages: str, sizes: dict[str, int], hidden_states: list[int], wrapper: Wrapper
) -> None:
    """The next stage receives hidden states of the last layer and of both predictions."""
    changed = (
        "position_embedding_type=rope",
        "transformer.mtp_num_layers=2",
        f"transformer.pipeline_model_parallel_layout={stages}",
    )
    batch = Batch(seq_length=64, global_batch_size=8)
    found = plan_preset("tiny", sizes, *changed, world_size=2 * sizes["pp"], wrapper=wrapper, batch=batch)
    parameters, flops = count_whole(*changed[:2], batch=batch)
    assert found.parameters == parameters
    assert sum(stage.flops for stage in found.stages) == flops / 2  # two data-parallel ranks share the batch
    sent = [traffic.bytes for stage in found.stages for traffic in stage.traffic if traffic.group == "pp"]
    assert sent == [
        4 * (4 * 64 * 64) * times for times in hidden_states
    ]  # 4 bytes, 4 microbatches of 64 tokens with 64 channels
