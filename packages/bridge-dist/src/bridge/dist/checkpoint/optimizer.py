"""The state of Megatron's optimizer in a checkpoint: the tensors have the same names whatever shards them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer import DistributedOptimizer

from bridge.dist.checkpoint.reader import Checkpoint
from bridge.dist.checkpoint.settings import (
    Settings,
    collect_settings,
    counts_steps_per_parameter,
    find_groups,
    has_form,
    list_optimizers,
    read_settings,
    write_settings,
    write_shared_settings,
)
from bridge.dist.checkpoint.shards import Shard
from bridge.dist.checkpoint.state import OPTIMIZER, RESHARDABLE, ModelState, fill, list_memory
from bridge.dist.patch import Replacement, replace_attributes

STATE = "optimizer.state."
"""How the names of the tensors begin; that of the parameter's state follows, then that of the parameter."""

MAIN = (f"{STATE}param.", f"{STATE}fp32_param.")
"""How the names of the parameters begin that an optimizer updates: a distributed one, and another one in bf16."""

_STEP = "step"
_SHARDS = "optimizer_shards"


class OptimizerState(NamedTuple):
    """The optimizer of a rank in a checkpoint: entries of the sharded state dict, and what gives it what was loaded."""

    state: dict[str, Any]
    take: Callable[[dict[str, Any]], None]
    main_parameters: Collection[torch.Tensor] = ()
    """The parameters under FSDP whose main parameters are among the entries."""


def make_saving_state(optimizer: Any, model: ModelState, *, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of an optimizer in a sharded state dict to save."""
    if not model.shards:
        return {OPTIMIZER: optimizer.sharded_state_dict(model.state, metadata=metadata)}
    settings = write_shared_settings(
        collect_settings(optimizer), optimizer, has_experts=any(shard.is_expert for shard in model.shards)
    )
    distributed, plain = MAIN
    is_distributed = isinstance(list_optimizers(optimizer)[0], DistributedOptimizer)

    def name_main(shard: Shard) -> str | None:
        if is_distributed:
            return distributed
        return plain if shard.main is not shard.parameter else None

    parts = _list_parts(optimizer, model.shards, name_main)
    return {OPTIMIZER: settings, _SHARDS: parts}


def make_loading_state(
    optimizer: Any, model: ModelState, checkpoint: Checkpoint, *, metadata: dict[str, Any]
) -> OptimizerState:
    """Return what to load an optimizer with, before its first step or later.

    An optimizer of one kind takes what another one saved: tensors are renamed, and settings are rewritten. Main
    parameters that the checkpoint lacks, as those of a model in fp32, are those of the model.

    Raises:
        CheckpointError: The settings in the checkpoint are not those of such an optimizer.
    """
    stored = checkpoint.metadata.state_dict_metadata
    saved, at = checkpoint.common.get(OPTIMIZER), checkpoint.iteration
    if model.shards:
        return _make_sharded_loading_state(optimizer, model, read_settings(saved, at=at), stored)
    if saved is not None and not has_form(saved, optimizer, at=at):
        checkpoint.common[OPTIMIZER] = write_settings(read_settings(saved, at=at), optimizer)
    _prepare(optimizer)
    state: dict[Any, Any] = optimizer.sharded_state_dict(model.state, is_loading=True, metadata=metadata)
    dict_list_map_inplace(lambda one: _rename_main(one, stored), state)
    optimizers = list_optimizers(optimizer)
    for one, entry in zip(optimizers, [state] if len(optimizers) == 1 else state.values(), strict=True):
        if isinstance(one, DistributedOptimizer) and entry["param_state_sharding_type"] == RESHARDABLE:
            _take_from_model(one, entry["param_state"], stored)
    return OptimizerState({OPTIMIZER: state}, lambda loaded: _set_state(optimizer, loaded[OPTIMIZER]))


def restart(optimizer: Any, model: ModelState) -> None:
    """Start an optimizer anew from the loaded parameters."""
    if not model.shards:
        optimizer.reload_model_params()
    _copy_to_main(model.shards)


def _rename_main(one: Any, stored: Collection[str]) -> Any:
    """Return a tensor under the name that its main parameter has in the checkpoint."""
    if not isinstance(one, ShardedTensor | ShardedTensorFactory):
        return one
    for name in MAIN:
        for other in MAIN:
            renamed = replace(one, key=other + one.key.removeprefix(name))
            if one.key.startswith(name) and not _is_stored(one, stored) and _is_stored(renamed, stored):
                return renamed
    return one


def _is_stored(one: ShardedTensor | ShardedTensorFactory, stored: Collection[str]) -> bool:
    parts = one.build() if isinstance(one, ShardedTensorFactory) else [one]
    return all(part.key in stored for part in nested_values(parts))


def _take_from_model(optimizer: DistributedOptimizer, state: dict[int, Any], stored: Collection[str]) -> None:
    """Let main parameters that a checkpoint lacks be those of the model: an optimizer in fp32 has no others."""
    # The order is that of DistributedOptimizer.sharded_param_state_fully_reshardable (megatron-core 0.19.2).
    parameters = [parameter for buffer in optimizer.buffers for parameter in buffer.param_index_map]
    for parameter, tensors in zip(parameters, state.values(), strict=True):
        if not _is_stored(tensors["param"], stored):
            tensors["param"] = LocalNonpersistentObject(parameter.detach())


def _set_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Set the state of an optimizer from a loaded one.

    Without Transformer Engine and Apex, Megatron's distributed optimizer (0.19.2) cannot load what it saved: torch's
    Adam keeps its step as a tensor in the state of each parameter, which the functions for loading do not expect.
    """
    set_tensors: Callable[..., None] = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_tensors_without_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        set_tensors(self, model_param, {_STEP: None} | tensors)

    name = "_set_main_param_and_optimizer_states"
    with replace_attributes(Replacement(DistributedOptimizer, name, set_tensors_without_step)):
        optimizer.load_state_dict(state)
    for one in _list_working(optimizer):
        for tensors in one.optimizer.state.values():
            if isinstance(step := tensors.get(_STEP), torch.Tensor):
                tensors[_STEP] = step.clone()  # Megatron gives all parameters one tensor, which each counts up


def _list_working(optimizer: Any) -> list[Any]:
    """Return the optimizers that have parameters."""
    return [one for one in list_optimizers(optimizer) if not one.is_stub_optimizer]


def _prepare(optimizer: Any) -> None:
    """Give an optimizer that has not taken a step the tensors to load."""
    for one in _list_working(optimizer):
        one.init_state_fn(one.optimizer, one.config)
        if counts_steps_per_parameter(one):
            for tensors in one.optimizer.state.values():
                tensors.setdefault(_STEP, torch.tensor(0.0))


# Under FSDP


def _make_sharded_loading_state(
    optimizer: Any, model: ModelState, settings: Settings, stored: Collection[str]
) -> OptimizerState:
    _prepare(optimizer)

    def name_main(shard: Shard) -> str | None:
        if not shard.has_own_main:
            return None
        return next((name for name in MAIN if all(name + part.place.key in stored for part in shard.parts)), None)

    parts = _list_parts(optimizer, model.shards, name_main)
    memory = list_memory(parts)
    saved = {shard.parameter for shard in model.shards if name_main(shard) is not None}

    def take(loaded: dict[str, Any]) -> None:
        fill(memory, loaded[_SHARDS])
        _copy_to_main(shard for shard in model.shards if shard.parameter not in saved)
        _set_settings(optimizer, settings)

    return OptimizerState({_SHARDS: parts}, take, saved)


def _copy_to_main(shards: Iterable[Shard]) -> None:
    for shard in shards:
        if shard.main is not shard.parameter:
            shard.main.to_local().detach().copy_(shard.parameter.to_local().detach())


def _list_parts(
    optimizer: Any, shards: Sequence[Shard], name_main: Callable[[Shard], str | None]
) -> list[ShardedTensor]:
    """Return the rows of an optimizer's tensors that this rank holds, as parts of a checkpoint.

    Args:
        optimizer: The optimizer.
        shards: The parameters.
        name_main: How the name of the parameter that it updates begins; None for one that is not in the checkpoint.
    """
    states = [one.optimizer.state for one in _list_working(optimizer)]
    parts = []
    for shard in shards:
        tensors: dict[str, Any] = next((state[shard.main] for state in states if shard.main in state), {})
        for name, value in tensors.items():
            if name != _STEP:
                parts += shard.cut(value.to_local(), prefix=f"{STATE}{name}.")
        if (prefix := name_main(shard)) is not None:
            parts += shard.cut(shard.main.to_local(), prefix=prefix)
    return parts


def _set_settings(optimizer: Any, settings: Settings) -> None:
    """Set the settings of an optimizer under FSDP.

    Raises:
        CheckpointError: It has a group of parameters that was not saved.
    """
    for one in _list_working(optimizer):
        for group, saved in zip(one.param_groups, find_groups(settings, one.param_groups), strict=True):
            group.update(saved)
            if not counts_steps_per_parameter(one):
                group[_STEP] = int(settings.step)
        for tensors in one.optimizer.state.values():
            if _STEP in tensors:
                tensors[_STEP] = torch.tensor(settings.step)
        if settings.scaler is not None and getattr(one, "grad_scaler", None):
            one.grad_scaler.load_state_dict(settings.scaler)
