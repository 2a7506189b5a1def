"""The settings of a saved optimizer, in whichever form its kind has them: learning rates, steps, the loss scale."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import DistributedOptimizer, FP32Optimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from bridge.dist.errors import CheckpointError

_SHARDING = {"param_state_sharding_type": "fully_reshardable"}
_EXPERTS = "is_expert_parallel"
_STEP = "step"

Group = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an optimizer keeps beside tensors. ``groups`` have no parameters and no step."""

    groups: list[Group]
    step: float
    scaler: dict[str, Any] | None = None


def read_settings(saved: Any, *, at: Path) -> Settings:
    """Return the settings in the common state of the iteration ``at`` a path.

    Megatron writes one entry for each optimizer of a chain, the second is that of experts.

    Raises:
        CheckpointError: They have none of Megatron's forms.
    """
    entries = _split(saved, at=at)
    for entry in entries:
        groups = _get_inner(entry).get("param_groups")
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise CheckpointError(f"the optimizer in the common state of {at} has no groups of parameters")
    steps = [one for entry in entries for one in _find_steps(entry, at=at)]
    scalers = [entry["grad_scaler"] for entry in entries if "grad_scaler" in entry]
    groups = [
        {key: value for key, value in group.items() if key not in ("params", _STEP)}
        for entry in entries
        for group in _get_inner(entry)["param_groups"]
    ]
    return Settings(groups=groups, step=max(steps, default=0.0), scaler=scalers[0] if scalers else None)


def has_form(saved: Any, optimizer: Any, *, at: Path) -> bool:
    """Return whether saved settings are in the form that an optimizer, or a chain of them, loads."""
    saved_forms = [(_SHARDING.keys() <= entry.keys(), "optimizer" in entry) for entry in _split(saved, at=at)]
    return saved_forms == [
        (isinstance(one, DistributedOptimizer), not isinstance(one, FP32Optimizer))
        for one in list_optimizers(optimizer)
    ]


def write_settings(settings: Settings, optimizer: Any) -> Any:
    """Return settings in the form that an optimizer or a chain of them loads.

    Raises:
        CheckpointError: The optimizer has a group of parameters that was not saved.
    """
    optimizers = list_optimizers(optimizer)
    return _join([_write_entry(settings, one, find_groups(settings, one.param_groups)) for one in optimizers])


def find_groups(settings: Settings, groups: Sequence[Group]) -> list[Group]:
    """Return the saved groups that correspond to an optimizer's, which are told apart by their settings.

    Raises:
        CheckpointError: There is none for one of them.
    """
    found = []
    for group in groups:
        # Megatron-FSDP (0.19.2) does not tell experts from others.
        for names in (param_group_identifier_keys, [one for one in param_group_identifier_keys if one != _EXPERTS]):
            same = [one for one in settings.groups if all(_get(one, name) == _get(group, name) for name in names)]
            if same:
                break
        else:
            wanted = {name: _get(group, name) for name in param_group_identifier_keys}
            raise CheckpointError(f"the optimizer in the checkpoint has no group of parameters with {wanted}")
        found.append(deepcopy(same[0]) | {_EXPERTS: group.get(_EXPERTS, False)})
    return found


def collect_settings(optimizer: Any) -> Settings:
    """Return the settings of an optimizer or of a chain of them."""
    optimizers = list_optimizers(optimizer)
    groups = [{k: v for k, v in group.items() if k != "params"} for one in optimizers for group in one.param_groups]
    steps = [float(group[_STEP]) for group in groups if _STEP in group]
    steps += [float(state[_STEP]) for one in optimizers for state in one.optimizer.state.values() if _STEP in state]
    scalers = [one.grad_scaler.state_dict() for one in optimizers if getattr(one, "grad_scaler", None)]
    for group in groups:
        group.pop(_STEP, None)
    return Settings(groups=groups, step=max(steps, default=0.0), scaler=scalers[0] if scalers else None)


def write_shared_settings(settings: Settings, optimizer: Any, *, has_experts: bool) -> Any:
    """Return the settings of a rank's optimizers as the chain that ranks without FSDP have: experts come second."""
    first = list_optimizers(optimizer)[0]
    entries = []
    for kind in [False, True] if has_experts else [False]:
        groups = [group for group in settings.groups if group.get(_EXPERTS, False) == kind] or settings.groups
        entries.append(_write_entry(settings, first, [group | {_EXPERTS: kind} for group in groups]))
    return _join(entries)


def list_optimizers(optimizer: Any) -> list[Any]:
    """Return the optimizers of a chain, or a single one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def counts_steps_per_parameter(optimizer: Any) -> bool:
    """Return whether torch's Adam does the work, which has a step for each parameter. Others have one per group."""
    return isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW)


def _write_entry(settings: Settings, optimizer: Any, groups: list[Group]) -> Any:
    in_state = counts_steps_per_parameter(optimizer) and not isinstance(optimizer, DistributedOptimizer)
    if not in_state:
        step = settings.step if counts_steps_per_parameter(optimizer) else int(settings.step)
        groups = [group | {_STEP: step} for group in groups]
    inner: dict[str, Any] = {"param_groups": groups}
    if isinstance(optimizer, DistributedOptimizer):
        return {"optimizer": inner} | _SHARDING | _write_scaler(settings)
    inner["state"] = {"common_step": torch.tensor(settings.step)} if in_state and settings.step else {}
    return inner if isinstance(optimizer, FP32Optimizer) else {"optimizer": inner} | _write_scaler(settings)


def _write_scaler(settings: Settings) -> dict[str, Any]:
    return {} if settings.scaler is None else {"grad_scaler": settings.scaler}


def _join(entries: list[Any]) -> Any:
    return entries[0] if len(entries) == 1 else dict(enumerate(entries))


def _split(saved: Any, *, at: Path) -> list[dict[str, Any]]:
    """Return the entries of a chain, or the only one."""
    is_chain = isinstance(saved, dict) and bool(saved) and all(isinstance(key, int) for key in saved)
    entries = [saved[key] for key in sorted(saved)] if is_chain else [saved]
    if not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"the optimizer in the common state of {at} is not a mapping")
    return entries


def _get_inner(entry: dict[str, Any]) -> dict[str, Any]:
    inner = entry.get("optimizer", entry)
    return inner if isinstance(inner, dict) else {}


def _find_steps(entry: dict[str, Any], *, at: Path) -> list[float]:
    """Return the steps of an entry. If it has a common one, those of its groups are old."""
    inner = _get_inner(entry)
    state = inner.get("state")
    common = state.get("common_step") if isinstance(state, dict) else None
    steps = [group.get(_STEP) for group in inner["param_groups"]] if common is None else [common]
    try:
        return [float(step) for step in steps if step is not None]
    except (TypeError, ValueError):
        raise CheckpointError(
            f"the optimizer in the common state of {at} has the steps {steps!r:.80}: expected numbers"
        ) from None


def _get(group: Group, name: str) -> Any:
    """Return a setting that tells groups apart; NeMo has another name for two of them."""
    return group.get(name, group.get(f"pre_{name}"))
