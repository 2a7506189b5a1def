"""Random states of a rank."""

from __future__ import annotations

import random

import numpy
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

# The default seed of megatron.training, and its offset per pipeline rank.
_SEED = 1234
_SEED_STRIDE = 100


def seed_random_states(config: TransformerConfig, groups: ProcessGroupCollection, *, seed: int = _SEED) -> None:
    """Seed Python, numpy, torch and Megatron's random states as megatron.training does, differently per pipeline rank.

    Source: ``_set_random_seed`` of megatron.training 0.19.2.
    """
    seed += _SEED_STRIDE * groups.pp.rank()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed,
        te_rng_tracker=config.use_te_rng_tracker,
        inference_rng_tracker=config.inference_rng_tracker,
        use_cudagraphable_rng=config.cuda_graph_impl != "none",
        force_reset_rng=True,  # an earlier job of this process may have had another kind of random states
    )
