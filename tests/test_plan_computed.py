"""The FLOPs of a rank in a plan."""

from __future__ import annotations

import pytest
from planned_jobs import RECOMPUTED, plan_preset

from bridge.config import Document
from bridge.dist.job import BuildJob, get_vocab_size, make_builder
from bridge.dist.layout import Layout
from bridge.dist.plan.count.rank import measure_rank
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


def test_recomputation_saves_memory_and_adds_flops() -> None:
    batch = Batch(seq_length=128, global_batch_size=8)
    usual = plan_preset("tiny", {}, world_size=1, batch=batch).worst
    recomputed = plan_preset("tiny", {}, *RECOMPUTED, world_size=1, batch=batch).worst
    assert recomputed.activation_bytes < usual.activation_bytes / 2
    (once,), (again,) = usual.chunks, recomputed.chunks
    logits = 2 * 128 * 64 * 256  # the output layer is not recomputed
    assert again.flops - once.flops == once.forward_flops - logits


@pytest.mark.parametrize("implementation", ["local", "transformer_engine", "full_iteration"])
def test_a_plan_ignores_cuda_graphs(implementation: str) -> None:
    graphs = ("transformer.use_te_rng_tracker=true", f"transformer.cuda_graph_impl={implementation}")
    found, without = plan_preset("tiny", {}, *graphs, world_size=1), plan_preset("tiny", {}, world_size=1)
    assert found.stages == without.stages
