"""Random states of a build equal those at the start of training with Megatron-LM."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from ranks import run_ranks

from bridge.dist import Layout, create_process_groups
from bridge.dist.checkpoint.random_states import collect_random_states, restore_random_states
from bridge.dist.engine.seeds import seed_random_states

SEED = 1234
Draws = tuple[float, float, float, float]


def draw() -> Draws:
    """Draw a number from each random state."""
    with get_cuda_rng_tracker().fork():
        megatron_draw = torch.rand(())
    return random.random(), float(numpy.random.random()), torch.rand(()).item(), megatron_draw.item()


def draw_both() -> tuple[Draws, Draws]:
    """Draw numbers after seeding by Bridge and after seeding by Megatron-LM."""
    from megatron.training.initialize import _set_random_seed

    config = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=1)
    groups = create_process_groups(Layout(tp=2, pp=2))
    seed_random_states(config, groups, seed=SEED)
    bridge_draws = draw()
    _set_random_seed(SEED)
    return bridge_draws, draw()


def test_each_rank_draws_the_same_numbers_as_megatron_lm() -> None:
    by_rank = run_ranks(draw_both, 4)
    for bridge_draws, megatron_draws in by_rank:
        assert bridge_draws == pytest.approx(megatron_draws, abs=0)
    stages = {bridge_draws[:3] for bridge_draws, _ in by_rank}
    assert len(stages) == 2  # all states except Megatron's are seeded by stage
    assert len({bridge_draws[3] for bridge_draws, _ in by_rank}) == 4


def collect_generator() -> tuple[torch.Tensor, float, float]:
    """Return the saved state of a generator as CUDA graphs have, and its next number before and after restoring."""
    groups = create_process_groups(Layout())
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    generator = torch.Generator().manual_seed(SEED)
    tracker.set_states({"model-parallel-rng": generator})
    (saved,) = collect_random_states(groups).data
    before = torch.rand((), generator=generator).item()
    restore_random_states([saved])
    with tracker.fork():
        after = torch.rand(()).item()
    return saved["rng_tracker_states"]["model-parallel-rng"], before, after


def test_generators_of_cuda_graphs_are_saved_as_tensors() -> None:
    ((state, before, after),) = run_ranks(collect_generator, 1)
    assert state.dtype == torch.uint8
    assert before == after
