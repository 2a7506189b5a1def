"""Compare what the stages of all ranks ask for with what a checkpoint has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from bridge.dist.checkpoint.optimizer import MAIN
from bridge.dist.checkpoint.reader import Checkpoint
from bridge.dist.checkpoint.state import OPTIMIZER_PREFIXES
from bridge.dist.checkpoint.together import gather
from bridge.dist.errors import CheckpointError

_EXTRA_STATE = "_extra_state"  # of Transformer Engine: scales of FP8, which other layers have not


def match_state(state: dict[str, Any], checkpoint: Checkpoint) -> list[str]:
    """Return what prevents loading: tensors that are missing, have another shape, or no rank asks for; bad objects.

    Collective over all ranks. Extra states that the checkpoint lacks keep their values.
    """
    stored = checkpoint.metadata.state_dict_metadata
    dict_list_map_inplace(lambda one: _keep_extra_state(one, stored), state)
    asked = [one for one in nested_values(load_preprocess(state)[0]) if isinstance(one, ShardedTensor | ShardedObject)]
    problems = list(_find_problems(asked, checkpoint))
    wanted = {name for names in gather({one.key for one in asked}) for name in names}
    has_optimizer = any(name.startswith(OPTIMIZER_PREFIXES) for name in wanted)
    problems += [
        f"{name}: the checkpoint has this tensor, but the model has not: it is of another model"
        for name, one in sorted(stored.items())
        if isinstance(one, TensorStorageMetadata)
        and name not in wanted
        and (has_optimizer or not name.startswith(OPTIMIZER_PREFIXES))
        and not _is_copy(name, stored)
    ]
    return problems


def _is_copy(name: str, stored: dict[str, Any]) -> bool:
    """Return whether a tensor is a main parameter with the numbers of one of the model in fp32."""
    prefix = next((one for one in MAIN if name.startswith(one)), None)
    parameter = stored.get(name.removeprefix(prefix)) if prefix else None
    return isinstance(parameter, TensorStorageMetadata) and parameter.properties.dtype == torch.float32


def _keep_extra_state(one: Any, stored: dict[str, Any]) -> Any:
    if isinstance(one, ShardedObject) and one.key.endswith(_EXTRA_STATE) and one.unique_key not in stored:
        return LocalNonpersistentObject(one.data)
    return one


def _find_problems(asked: list[ShardedTensor | ShardedObject], checkpoint: Checkpoint) -> Iterator[str]:
    for one in asked:
        name = one.unique_key if isinstance(one, ShardedObject) else one.key
        found = checkpoint.metadata.state_dict_metadata.get(name)
        if found is None:
            yield f"{name}: the checkpoint has no such {'object' if isinstance(one, ShardedObject) else 'tensor'}"
        elif isinstance(one, ShardedTensor) and isinstance(found, TensorStorageMetadata):
            ours, theirs = tuple(one.global_shape), tuple(found.size)
            # The rows that pad the vocabulary may differ.
            same = ours[1:] == theirs[1:] and len(ours) == len(theirs) if one.allow_shape_mismatch else ours == theirs
            if not same:
                yield f"{name}: the model has the shape {list(ours)}, the checkpoint {list(theirs)}"
        elif isinstance(found, TensorStorageMetadata) or isinstance(one, ShardedTensor):
            yield f"{name}: is an object in one of model and checkpoint, and a tensor in the other"
        else:
            try:
                checkpoint.read_object(name)  # before tensors are loaded
            except CheckpointError as error:
                yield str(error)
