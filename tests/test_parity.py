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


def train_tiny(sizes: dict[str, int], transformer: dict[str, Any], ddp: dict[str, Any]) -> Run:
    """On each rank: build the tiny preset for a layout, wrap it, train it."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bridge.config import Document
    from bridge.dist import Layout, create_process_groups
    from bridge.dist.commands import apply_layout
    from bridge.dist.job import _wrapper_names
    from bridge.dist.text import Text, default_text
    from bridge.dist.train import TrainOptions, train
    from bridge.dist.weights import draw_weights

    document = Document.load("tiny")
    for name, value in transformer.items():
        document.set(f"transformer.{name}", value)
    apply_layout(document, sizes)
    config = document.config()
    layout = Layout.of(config.transformer, torch.distributed.get_world_size())
    groups = create_process_groups(layout)
    model_parallel_cuda_manual_seed(1)

    def draw(stages: list[Any]) -> list[Any]:
        draw_weights(stages, groups, vocab_size=config.vocab_size)
        return stages

    config.pre_wrap_hooks.append(draw)
    stages = config.get_builder_cls()(config).build_distributed_models(groups, DistributedDataParallelConfig(**ddp))
    text = Text.read(default_text(), vocab_size=config.vocab_size)
    options = TrainOptions(steps=STEPS, text=default_text(), seq_length=32)
    steps = list(train(stages, groups, layout, text=text, options=options))
    return Run(
        [step.loss for step in steps], [step.grad_norm for step in steps], [list(_wrapper_names(s)) for s in stages]
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
BF16 = {"bf16": True}


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
