"""The random states of a rank, in the form of megatron.training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import convert_cuda_rng_state, is_graph_safe_cuda_rng_tracker

from bridge.dist.errors import CheckpointError

KEY = "rng_state"
_TRACKER = "rng_tracker_states"
_NAMES = {"random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state", _TRACKER}


def collect_random_states(pg_collection: ProcessGroupCollection) -> ShardedObject:
    """Return the random states of this rank as part of a checkpoint: one for each tensor and pipeline rank.

    Source: ``get_rng_state`` of megatron.training 0.19.2, which with CUDA graphs saves generators of the GPU. These
    cannot be read without one, so here they are tensors, which Megatron reads too.
    """
    tracker = get_cuda_rng_tracker().get_states()
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        _TRACKER: {name: convert_cuda_rng_state(one) for name, one in tracker.items()},
    }
    tp, pp = pg_collection.tp, pg_collection.pp
    return ShardedObject(
        KEY, [state], (pp.size(), tp.size()), (pp.rank(), tp.rank()), replica_id=pg_collection.dp_cp.rank()
    )


def check_random_states(states: Any, *, at: Path) -> None:
    """Check that the random states in the iteration ``at`` a path have Megatron's form.

    Raises:
        CheckpointError: They have not.
    """
    state = states[0] if isinstance(states, list) and len(states) == 1 else None
    if not isinstance(state, dict) or not state.keys() >= _NAMES or not isinstance(state[_TRACKER], dict):
        raise CheckpointError(f"the random states of {at} are not those of Megatron: {', '.join(sorted(_NAMES))}")


def restore_random_states(states: list[dict[str, Any]]) -> None:
    """Set the random states of this rank from those of a checkpoint."""
    state = states[0]
    random.setstate(state["random_rng_state"])
    numpy.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tracker = get_cuda_rng_tracker()
    graphs = is_graph_safe_cuda_rng_tracker(tracker)
    tracker.set_states(
        {name: convert_cuda_rng_state(one, to_graphable=graphs) for name, one in state[_TRACKER].items()}
    )
