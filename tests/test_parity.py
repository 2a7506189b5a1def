"""The same model trains the same under every layout: real processes, Megatron's own schedule and optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from ranks import run_ranks

STEPS = 5


class Run(NamedTuple):
    """What one run gave: per step the loss and the gradient norm, and what the stages of rank 0 are wrapped in."""

    losses: list[float]
    grad_norms: list[float]
    wrappers: list[list[str]]


def train_tiny(
    sizes: dict[str, int], overrides: dict[str, Any], ddp: dict[str, Any], flags: dict[str, bool] | None = None
) -> Run:
    """On each rank: build the tiny preset for a layout, wrap it, train it."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bridge.config import Document
    from bridge.dist import Layout, create_process_groups
    from bridge.dist.documents import apply_layout
    from bridge.dist.job import wrapper_names
    from bridge.dist.text import Text, default_text
    from bridge.dist.train import TrainOptions, train
    from bridge.dist.weights import draw_weights

    document = Document.load("tiny")
    for path, value in overrides.items():
        document.set(path, value)
    apply_layout(document, sizes)
    config = document.config()
    layout = Layout.of(config.transformer, torch.distributed.get_world_size())
    groups = create_process_groups(layout)
    model_parallel_cuda_manual_seed(1)

    def draw(stages: list[Any]) -> list[Any]:
        draw_weights(stages, groups, vocab_size=config.vocab_size)
        return stages

    config.pre_wrap_hooks.append(draw)
    builder = config.get_builder_cls()(config)
    stages = builder.build_distributed_models(groups, DistributedDataParallelConfig(**ddp), **flags or {})
    text = Text.read(default_text(), vocab_size=config.vocab_size)
    options = TrainOptions(steps=STEPS, text=default_text(), seq_length=32)
    steps = list(train(stages, groups, layout, text=text, options=options))
    return Run(
        [step.loss for step in steps], [step.grad_norm for step in steps], [list(wrapper_names(s)) for s in stages]
    )


LAYOUTS = {
    "dp2": (2, {}, {}),
    "dp2 overlap": (2, {}, {"overlap_grad_reduce": True}),
    "dp2 distributed optimizer": (2, {}, {"use_distributed_optimizer": True}),
    "dp2 distributed optimizer, overlap": (
        2,
        {},
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "bucket_size": 10_000},
    ),
    "tp2": (2, {"tp": 2}, {}),
    "pp2": (2, {"pp": 2}, {}),
    "pp2 vp2": (2, {"pp": 2, "vp": 2}, {}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}, {}),
    "tp2 pp2 vp2": (4, {"tp": 2, "pp": 2, "vp": 2}, {}),
    "dp2 pp2 distributed optimizer": (4, {"pp": 2}, {"use_distributed_optimizer": True}),
}
BF16 = {"transformer.bf16": True}


@pytest.fixture(scope="module")
def one_process() -> Run:
    return run_ranks(train_tiny, 1, {}, {}, {})[0]


@pytest.fixture(scope="module")
def one_process_bf16() -> Run:
    return run_ranks(train_tiny, 1, {}, BF16, {"grad_reduce_in_fp32": True})[0]


def test_training_lowers_the_loss(one_process: Run) -> None:
    assert one_process.losses == sorted(one_process.losses, reverse=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_fp32(name: str, one_process: Run) -> None:
    world_size, sizes, ddp = LAYOUTS[name]
    for run in run_ranks(train_tiny, world_size, sizes, {}, ddp):
        assert run.losses == pytest.approx(one_process.losses, rel=1e-5)
        assert run.grad_norms == pytest.approx(one_process.grad_norms, rel=1e-5)
        assert all(wrappers == ["DistributedDataParallel", "GPTModel"] for wrappers in run.wrappers)


@pytest.mark.parametrize("name", LAYOUTS)
def test_bf16(name: str, one_process_bf16: Run) -> None:
    world_size, sizes, ddp = LAYOUTS[name]
    for run in run_ranks(train_tiny, world_size, sizes, BF16, ddp | {"grad_reduce_in_fp32": True}):
        # bf16 has 8 bits of precision; sums over ranks are rounded in another order.
        assert run.losses == pytest.approx(one_process_bf16.losses, rel=2**-8)
        assert run.grad_norms == pytest.approx(one_process_bf16.grad_norms, rel=2**-6)
        assert all(wrappers == ["DistributedDataParallel", "Float16Module", "GPTModel"] for wrappers in run.wrappers)


FSDP = {
    "FullyShardedDataParallel": (
        {
            "use_megatron_fsdp": True,
            "use_distributed_optimizer": True,
            "data_parallel_sharding_strategy": "optim_grads_params",
            "gradient_reduce_div_fusion": False,
        },
        {"use_megatron_fsdp": True},
    ),
    "TorchFullyShardedDataParallel": ({}, {"use_torch_fsdp2": True}),
}


@pytest.mark.parametrize("wrapper", FSDP)
def test_fully_sharded(wrapper: str, one_process: Run) -> None:
    for run in run_ranks(train_tiny, 2, {}, {}, *FSDP[wrapper]):
        assert run.losses == pytest.approx(one_process.losses, rel=1e-5)
        assert run.grad_norms == pytest.approx(one_process.grad_norms, rel=1e-5)
        assert run.wrappers[0][0] == wrapper


@pytest.mark.parametrize(
    ("world_size", "sizes", "overrides"),
    [
        # The last stage's copy of a tied embedding starts, and stays, as the first stage's.
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
def test_other_models(world_size: int, sizes: dict[str, int], overrides: dict[str, Any]) -> None:
    one = run_ranks(train_tiny, 1, {}, overrides, {})[0]
    for run in run_ranks(train_tiny, world_size, sizes, overrides, {}):
        assert run.losses == pytest.approx(one.losses, rel=1e-5)
        assert run.grad_norms == pytest.approx(one.grad_norms, rel=1e-5)


def build_twice() -> None:
    """On each rank: two builds of one builder are alike, and leave what they were given as it was."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bridge.config import Document
    from bridge.dist import Layout, create_process_groups
    from bridge.dist.documents import apply_layout

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


def test_the_same_builder_builds_the_same_twice() -> None:
    run_ranks(build_twice, 2)
