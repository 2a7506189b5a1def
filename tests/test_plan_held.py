"""The memory of a rank in a plan: weights, gradients, optimizer, peak activations."""

from __future__ import annotations

from typing import Any

import pytest
from planned_jobs import plan_preset

from bridge.config import Document
from bridge.dist.document_layout import apply_layout
from bridge.dist.plan.forecast.advice import advise
from bridge.dist.plan.forecast.machine import load_machine
from bridge.dist.plan.forecast.step_time import estimate_time
from bridge.dist.plan.plan import PlanOptions, plan
from bridge.dist.train.batch import Batch
from bridge.dist.wrapper import Wrapper

EMBEDDING_AND_OUTPUT_COUNT_AS_LAYERS = (
    "transformer.account_for_embedding_in_pipeline_split=true",
    "transformer.account_for_loss_in_pipeline_split=true",
    "transformer.sequence_parallel=true",
)


def test_llama_405b_on_16384_gpus() -> None:
    found = plan_preset(
        "llama-3.1-405b",
        {"tp": 8, "pp": 16, "vp": 8},
        *EMBEDDING_AND_OUTPUT_COUNT_AS_LAYERS,
        world_size=16_384,
        distributed_optimizer=True,
    )
    assert found.parameters == 405_853_388_800  # as published
    assert [len(stage.chunks) for stage in found.stages] == [8] * 16
    stage = found.stages[1]
    # Eight layers on eight ranks: weights in half precision, gradients in fp32, optimizer state sharded by 128 ranks.
    attention, feed_forward = 16384 * (16384 + 2 * 1024) + 16384 * 16384, 3 * 16384 * 53248
    split, whole = (attention + feed_forward) // 8, 2 * 16384
    assert stage.parameters == 8 * (split + whole)
    assert stage.weight_bytes == pytest.approx(2 * stage.parameters, rel=1e-5)  # and padding of the buffers
    assert stage.gradient_bytes == 2 * stage.weight_bytes
    assert stage.optimizer_bytes == pytest.approx(12 * stage.parameters / 128, rel=1e-5)
    # 6 FLOPs per parameter and token, forward and backward, and attention: scores and their product with values.
    tokens, microbatches = 8192, found.microbatches
    attended = 4 * tokens * 16384 // 8
    assert stage.flops == pytest.approx(8 * microbatches * tokens * (6 * split + 3.5 * attended), rel=0.01)


def test_deepseek_v3_on_2048_gpus() -> None:
    # Three layers with the embedding, 14 stages of four layers, two layers with the output layer.
    layout = "transformer.pipeline_model_parallel_layout=Ettt|(tttt|)*14,ttL"
    found = plan_preset("deepseek-v3", {"pp": 16, "ep": 64}, layout, world_size=2048, distributed_optimizer=True)
    assert found.parameters + found.buffers == 671_026_419_200  # as published, with the biases of 58 routers
    assert found.buffers == 58 * 256
    assert {traffic.group for stage in found.stages for traffic in stage.traffic} >= {"ep", "pp", "expt_dp"}


@pytest.mark.parametrize("wrapper", [Wrapper.MEGATRON_FSDP, Wrapper.TORCH_FSDP2])
def test_a_sharded_llama_8b_gathers_and_reduces_its_weights(wrapper: Wrapper) -> None:
    """Two layers keep it fast; embedding and output layer have their full size."""
    found = plan_preset("llama-3.1-8b", {}, "transformer.num_layers=2", world_size=64, wrapper=wrapper)
    (stage,) = found.stages
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    ends = 2 * 128_256 * 4096 + 4096
    assert found.parameters == 2 * layer + ends
    assert stage.weight_bytes == pytest.approx(2 * found.parameters / 64, rel=1e-3)  # half precision, and padding
    assert stage.optimizer_bytes == pytest.approx(12 * found.parameters / 64, rel=1e-3)
    # At the end of the backward pass at least embedding and output layer are unsharded, in half precision.
    assert 2 * ends < stage.unsharded_bytes < 5 * found.parameters
    gathered = {traffic.operation: traffic for traffic in stage.traffic if traffic.group == "dp_cp"}
    # The batch is one microbatch: weights are gathered twice, except the first and last ones, and reduced once.
    size = gathered["allgather"].bytes
    assert 2 * (2 * layer + ends) < size < 1.001 * 2 * 2 * found.parameters
    assert gathered["reduce_scatter"].bytes == pytest.approx(2 * found.parameters, rel=1e-3)
    assert stage.total_bytes == sum(
        (
            stage.weight_bytes,
            stage.gradient_bytes,
            stage.optimizer_bytes,
            stage.activation_bytes,
            stage.unsharded_bytes,
        )
    )


def test_peak_activations_follow_the_schedule() -> None:
    # 1F1B: the first of four ranks keeps activations of four microbatches, the last rank of one.
    found = plan_preset("tiny", {"pp": 4}, world_size=4, batch=Batch(seq_length=128, global_batch_size=16))
    kept = [stage.activation_bytes / stage.chunks[0].activation_bytes for stage in found.stages]
    assert kept == [4, 3, 2, 1]


def test_a_memo_does_not_change_a_plan() -> None:
    memo: Any = {}
    document = Document.load("hybrid-tiny")
    apply_layout(document, {"pp": 2})
    options = PlanOptions(batch=Batch(seq_length=32), world_size=4)
    first, again = (plan(document, options, memo=memo) for _ in range(2))
    assert again.stages == first.stages == plan(document, options).stages


def test_changes_are_advised_with_their_memory_and_time() -> None:
    document = Document.load("tiny", ["transformer.add_bias_linear=false"])  # with biases, an MLP cannot be recomputed
    options = PlanOptions(batch=Batch(seq_length=128, global_batch_size=8), world_size=2)
    planned, machine = plan(document, options), load_machine("h100")
    advised = {one.change: (one.total_bytes, one.step_seconds) for one in advise(document, options, planned, machine)}
    some = advised["transformer.recompute_granularity=selective 'transformer.recompute_modules=[mlp]'"]
    most = advised[
        "transformer.recompute_granularity=full transformer.recompute_method=uniform transformer.recompute_num_layers=1"
    ]
    assert most[0] < some[0] < planned.worst.total_bytes
    assert most[1] > some[1] > estimate_time(planned, machine).step_seconds
    apply_layout(document, {"pp": 2})
    longer = plan(document, options)
    assert longer.worst.total_bytes < planned.worst.total_bytes
    assert advised["--pp 2 --dp 1"] == (longer.worst.total_bytes, estimate_time(longer, machine).step_seconds)
