"""Random states of a build are those that Megatron-LM starts training with."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from ranks import run_ranks

from bridge.dist import Layout, create_process_groups
from bridge.dist.run.execute import seed_random_states

SEED = 1234
Draws = tuple[float, float, float, float]


def draw() -> Draws:
    """A number of each state."""
    with get_cuda_rng_tracker().fork():
        of_tensor_parallel_rank = torch.rand(())
    return random.random(), float(numpy.random.random()), torch.rand(()).item(), of_tensor_parallel_rank.item()


def draw_both() -> tuple[Draws, Draws]:
    """What we seed, and what Megatron-LM does."""
    from megatron.training.initialize import _set_random_seed

    config = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=1)
    groups = create_process_groups(Layout(tp=2, pp=2))
    seed_random_states(config, groups, seed=SEED)
    ours = draw()
    _set_random_seed(SEED)
    return ours, draw()


def test_each_rank_draws_the_same_numbers_as_megatron_lm() -> None:
    by_rank = run_ranks(draw_both, 4)
    for ours, theirs in by_rank:
        assert ours == pytest.approx(theirs, abs=0)
    stages = {ours[:3] for ours, _ in by_rank}
    assert len(stages) == 2  # the states but Megatron's are those of the stage
    assert len({ours[3] for ours, _ in by_rank}) == 4
