"""Models that are not in the matrix train the same under layouts, and builds can be repeated."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from ranks import run_ranks


def train_tiny(sizes: dict[str, int], overrides: dict[str, Any]) -> tuple[list[float], list[float | None]]:
    """Build the tiny preset for a layout, wrap it with DDP and train it; return losses and gradient norms."""
    import torch

    from bridge.config import Document
    from bridge.dist import create_process_groups
    from bridge.dist.document_layout import apply_layout
    from bridge.dist.job import BuildJob
    from bridge.dist.run.execute import build_and_train
    from bridge.dist.train.step import TrainOptions
    from bridge.dist.train.text import find_default_text
    from bridge.dist.wrapper import Wrapper

    document = Document.load("tiny")
    for path, value in overrides.items():
        document.set(path, value)
    apply_layout(document, sizes)
    training = TrainOptions(steps=3, text=find_default_text(), seq_length=32, global_batch_size=4)
    job = BuildJob(document=document.data, wrapper=Wrapper.DDP, training=training)
    config = document.config()
    layout = job.check(config, torch.distributed.get_world_size())
    groups = create_process_groups(layout, embedding_ranks=job.find_embedding_ranks(config))
    steps = build_and_train(job, config, layout, groups).steps
    return [step.loss for step in steps], [step.grad_norm for step in steps]


@functools.cache
def _train_alone(overrides: str) -> tuple[list[float], list[float | None]]:
    """Train a model, given by overrides as JSON, on one rank."""
    return run_ranks(train_tiny, 1, {}, json.loads(overrides))[0]


@pytest.mark.parametrize(
    ("world_size", "sizes", "overrides"),
    [
        # The copy of a tied embedding on the last stage must stay equal to that on the first stage.
        (
            2,
            {"pp": 2},
            {"share_embeddings_and_output_weights": True, "transformer.embedding_init_method_std": 0.1},
        ),
        (2, {"tp": 2}, {"transformer.gated_linear_unit": True, "transformer.num_query_groups": 2}),
        (2, {"pp": 2}, {"position_embedding_type": "rope", "transformer.mtp_num_layers": 1}),
        (4, {"pp": 4, "vp": 2}, {"transformer.num_layers": 8}),
        (
            2,
            {"ep": 2},
            {
                "transformer.num_moe_experts": 4,
                "transformer.moe_router_load_balancing_type": "none",
                "transformer.add_bias_linear": False,
            },
        ),
    ],
    ids=["tied embeddings", "gated, grouped queries", "multi-token prediction", "pp4 vp2", "experts"],
)
def test_other_models_train_the_same_under_layouts(
    world_size: int, sizes: dict[str, int], overrides: dict[str, Any]
) -> None:
    losses, norms = _train_alone(json.dumps(overrides))
    for found in run_ranks(train_tiny, world_size, sizes, overrides):
        assert found[0] == pytest.approx(losses, rel=1e-5)
        assert found[1] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(("pp", "layout"), [(2, "Ettttm|L"), (3, "Ett|ttm|L")])
def test_multi_token_prediction_on_another_stage_trains_the_same(pp: int, layout: str, is_tied: bool) -> None:
    model = {
        "position_embedding_type": "rope",
        "transformer.mtp_num_layers": 1,
        "share_embeddings_and_output_weights": is_tied,
    }
    losses, norms = _train_alone(json.dumps(model))
    split = model | {"transformer.pipeline_model_parallel_layout": layout}
    for found in run_ranks(train_tiny, pp, {"pp": pp}, split):
        assert found[0] == pytest.approx(losses, rel=1e-5)
        assert found[1] == pytest.approx(norms, rel=1e-5)


def build_twice() -> None:
    """Check that two builds of one builder are equal and do not change their arguments."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bridge.config import Document
    from bridge.dist import Layout, create_process_groups
    from bridge.dist.document_layout import apply_layout

    document = Document.load("tiny")
    apply_layout(document, {"pp": 2, "vp": 2})
    config = document.config()
    groups = create_process_groups(Layout.of(config.transformer, 2))
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, num_buckets=3, bucket_size=None
    )
    builder = config.get_builder_cls()(config)
    before = dict(vars(ddp_config)), dict(vars(config.transformer)), config.as_dict()
    builds = []
    for _ in range(2):
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        builds.append(builder.build_distributed_models(groups, ddp_config))
        assert (vars(ddp_config), vars(config.transformer), config.as_dict()) == before
    for first, second in zip(*builds, strict=True):
        assert first.ddp_config == second.ddp_config
        assert [len(buffer.buckets) for buffer in first.buffers] == [len(buffer.buckets) for buffer in second.buffers]
        weights, again = dict(first.named_parameters()), dict(second.named_parameters())
        assert weights.keys() == again.keys()
        assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_one_builder_builds_the_same_model_twice() -> None:
    run_ranks(build_twice, 2)


def step_in_fp16(sharded: bool) -> tuple[float, bool]:
    """Return the loss of a second step, and whether weights are updated if gradients of rank 1 overflow."""
    import torch

    from bridge.config import Document
    from bridge.dist import create_process_groups
    from bridge.dist.job import BuildJob
    from bridge.dist.run.execute import build_and_train
    from bridge.dist.train.optimizer import set_up_optimizer
    from bridge.dist.train.step import TrainOptions
    from bridge.dist.train.text import find_default_text
    from bridge.dist.wrapper import Wrapper

    document = Document.load("tiny", ["transformer.fp16=true", "transformer.params_dtype=torch.float16"])
    training = TrainOptions(steps=2, text=find_default_text(), seq_length=32)
    wrapper = Wrapper.TORCH_FSDP2 if sharded else Wrapper.DDP
    job = BuildJob(document=document.data, wrapper=wrapper, training=training)
    config = document.config()
    layout = job.check(config, torch.distributed.get_world_size())
    run = build_and_train(job, config, layout, create_process_groups(layout))
    for parameter in run.stages[0].parameters():
        gradient: Any = torch.zeros_like(parameter)
        if torch.distributed.get_rank() == 1:
            (gradient.to_local() if sharded else gradient).fill_(torch.inf)
        parameter.grad = gradient
    with set_up_optimizer(run.stages) as optimizer:
        updated, _, _ = optimizer.step()
    return run.steps[-1].loss, updated


def test_torch_fsdp2_ranks_skip_the_same_fp16_steps() -> None:
    """Megatron-LM does not support this. megatron-core 0.19.2 combines overflows of model-parallel ranks, and DTensor
    those of data-parallel ranks.
    """
    (whole, _), *_ = run_ranks(step_in_fp16, 2, False)
    for loss, updated in run_ranks(step_in_fp16, 2, True):
        assert loss == pytest.approx(whole, rel=1e-3)
        assert not updated
