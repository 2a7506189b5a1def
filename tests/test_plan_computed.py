"""The FLOPs of a rank in a plan."""

from __future__ import annotations

import pytest
from planned_jobs import RECOMPUTED, plan_preset

from bridge.config import Document
from bridge.dist.job import BuildJob, get_vocab_size, make_builder
from bridge.dist.layout import Layout
from bridge.dist.plan.count.rank import measure_rank
from bridge.dist.plan.forecast.variants import list_microbatch_counts, vary_memory
from bridge.dist.train.batch import Batch
from bridge.dist.train.flops import count_model_flops
from bridge.dist.wrapper import Wrapper


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("tiny", []),
        ("tiny", ["position_embedding_type=rope", "transformer.mtp_num_layers=1"]),
        ("tiny", ["share_embeddings_and_output_weights=true"]),
        ("moe-tiny", []),
        ("mla-tiny", []),
        ("t5-tiny", []),
    ],
)
def test_flops_by_shape_equal_the_counted_flops(preset: str, overrides: list[str]) -> None:
    by_shapes, counted = compute_flops(Document.load(preset, overrides))
    assert by_shapes == 3 * counted


def test_flops_by_shape_exclude_products_within_chunks_of_a_scan() -> None:
    by_shapes, counted = compute_flops(Document.load("mamba-tiny"))
    # For each of 4 layers and 128 tokens in one chunk: scores of 4 groups with a state of 16, and the product of the
    # scores with 128 channels.
    within_chunks = 4 * 128 * (2 * 128 * 4 * 16 + 2 * 128 * 128)
    assert by_shapes == 3 * (counted - within_chunks)


def compute_flops(document: Document) -> tuple[int, int]:
    """Return the FLOPs of a step of 128 tokens, computed from shapes, and those counted in its forward pass."""
    batch = Batch(seq_length=128, global_batch_size=1)
    job = BuildJob(document=document.data, wrapper=Wrapper.DDP)
    config = document.config()
    rank = measure_rank(job, Layout(), batch, rank=0, memo={})
    shapes = {placement.full_name: placement.logical_shape(get_vocab_size(config)) for placement, _ in rank.placements}
    by_shapes = count_model_flops(shapes, make_builder(config).transformer_config, batch)
    return by_shapes, sum(chunk.work.forward_flops for chunk in rank.chunks)


def test_gradients_of_weights_take_two_flops_per_weight_and_token() -> None:
    document, batch = Document.load("tiny"), Batch(seq_length=128, global_batch_size=1)
    rank = measure_rank(BuildJob(document=document.data, wrapper=Wrapper.DDP), Layout(), batch, rank=0, memo={})
    shapes = {one.full_name: one.logical_shape(None) for one, _ in rank.placements if "embedding" not in one.full_name}
    (chunk,) = rank.chunks
    weights = sum(shape.numel() for shape in shapes.values() if len(shape) == 2)
    assert chunk.work.weight_gradient_flops == 2 * 128 * weights


@pytest.mark.parametrize("sizes", [{"pp": 4}, {"pp": 2, "vp": 2}])
def test_memory_of_other_numbers_of_microbatches_is_that_of_a_new_plan(sizes: dict[str, int]) -> None:
    plans = {
        count: plan_preset("tiny", sizes, world_size=sizes["pp"], batch=Batch(seq_length=128, global_batch_size=count))
        for count in (2, 4, 8)
    }
    counts = list_microbatch_counts(plans[4])
    assert {4, 8} <= set(counts)
    varied = dict(zip(plans, vary_memory(plans[4], list(plans)), strict=True))
    for count, plan in plans.items():
        memory = [(stage.activation_bytes, stage.total_bytes) for stage in plan.stages]
        assert [(stage.activation_bytes, stage.total_bytes) for stage in varied[count]] == memory
    assert plans[2].worst.activation_bytes < plans[8].worst.activation_bytes


def test_recomputation_saves_memory_and_adds_flops() -> None:
    batch = Batch(seq_length=128, global_batch_size=8)
    usual = plan_preset("tiny", {}, world_size=1, batch=batch).worst
    recomputed = plan_preset("tiny", {}, *RECOMPUTED, world_size=1, batch=batch).worst
    assert recomputed.activation_bytes < usual.activation_bytes / 2
    (once,), (again,) = usual.chunks, recomputed.chunks
    logits = 2 * 128 * 64 * 256  # the output layer is not recomputed
    assert again.flops - once.flops == once.forward_flops - logits
    assert again.weight_gradient_flops == once.weight_gradient_flops


def test_what_is_recomputed_does_not_depend_on_the_wrapper() -> None:
    """Weights that are gathered again for it count as unsharded memory."""
    batch, loss = Batch(seq_length=128, global_batch_size=2), "transformer.cross_entropy_loss_fusion=false"
    with_ddp, *sharded = (
        plan_preset("tiny", {}, *RECOMPUTED, loss, world_size=2, batch=batch, wrapper=wrapper).worst.chunks
        for wrapper in (Wrapper.DDP, Wrapper.MEGATRON_FSDP, Wrapper.TORCH_FSDP2)
    )
    assert with_ddp[0].temporary_bytes > 0
    assert [chunk.temporary_bytes for (chunk,) in sharded] == 2 * [with_ddp[0].temporary_bytes]


def test_a_fused_activation_keeps_its_input_only() -> None:
    """The other two are kept without the fusion: the activated gate, and its product with the other half."""
    batch, unfused = Batch(seq_length=128, global_batch_size=1), "transformer.bias_activation_fusion=false"
    fused = plan_preset("mla-tiny", {}, world_size=1, batch=batch).worst
    more = plan_preset("mla-tiny", {}, unfused, world_size=1, batch=batch).worst.activation_bytes
    assert more - fused.activation_bytes == 2 * 4 * 128 * 128 * 4  # layers, tokens, ffn_hidden_size, bytes of an fp32


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (["bf16=true", "cross_entropy_loss_fusion=true"], 6),  # compiled: in fp32, then in bf16
        (["bf16=true", "cross_entropy_loss_fusion=false"], 2),  # in place of the probabilities, then in bf16
        (["cross_entropy_loss_fusion=false"], 0),  # in place of the probabilities
    ],
)
def test_gradients_of_the_logits_count_where_the_loss_is(settings: list[str], size: int) -> None:
    overrides = [f"transformer.{setting}" for setting in settings]
    batch = Batch(seq_length=128, micro_batch_size=2, global_batch_size=8)
    first, last = plan_preset("tiny", {"pp": 2, "tp": 2}, *overrides, world_size=4, batch=batch).stages
    assert first.activation_bytes == 2 * first.chunks[0].activation_bytes  # two microbatches are in flight
    assert last.activation_bytes - last.chunks[0].activation_bytes == size * 2 * 128 * 256 // 2  # vocabulary over tp


@pytest.mark.parametrize("implementation", ["local", "transformer_engine", "full_iteration"])
def test_a_plan_ignores_cuda_graphs(implementation: str) -> None:
    graphs = ("transformer.use_te_rng_tracker=true", f"transformer.cuda_graph_impl={implementation}")
    found, without = plan_preset("tiny", {}, *graphs, world_size=1), plan_preset("tiny", {}, world_size=1)
    assert found.stages == without.stages


def test_activations_around_products_grow_with_the_tokens() -> None:
    """As many tokens as the hidden size give inputs the shape of weights."""
    hidden = 64

    def count(tokens: int) -> int:
        batch = Batch(seq_length=tokens, global_batch_size=1)
        chunk = plan_preset("tiny", {}, world_size=1, batch=batch).worst.chunks[0]
        return chunk.forward.operations.activation_bytes + chunk.backward.operations.activation_bytes

    assert Document.load("tiny").data["transformer"]["hidden_size"] == hidden
    assert 2 * count(hidden) == count(2 * hidden)
