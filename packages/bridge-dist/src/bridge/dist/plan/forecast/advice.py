"""Advice for a job that does not fit the memory of its GPUs; the effect of each change is planned."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

from bridge.config import BridgeError, Document
from bridge.dist.document_layout import apply_layout
from bridge.dist.plan.forecast.machine import Machine
from bridge.dist.plan.forecast.step_time import estimate_time
from bridge.dist.plan.plan import PlanOptions, plan
from bridge.dist.plan.results import Plan
from bridge.dist.wrapper import ShardingStrategy, Wrapper


class Advice(NamedTuple):
    """A change in words, the resulting memory of the largest rank in bytes, and the estimated time of a step."""

    change: str
    total_bytes: int
    step_seconds: float


def advise(document: Document, options: PlanOptions, planned: Plan, machine: Machine) -> list[Advice]:
    """Return the changes that reduce the memory of the largest rank, most effective first."""
    helpful = []
    for change, changed, other in _propose_changes(document, options, planned):
        try:
            found = plan(changed, other)
        except BridgeError:  # the job is not possible with this change
            continue
        if found.worst.total_bytes < planned.worst.total_bytes:
            helpful.append(Advice(change, found.worst.total_bytes, estimate_time(found, machine).step_seconds))
    return sorted(helpful, key=lambda advice: advice.total_bytes)


def _propose_changes(
    document: Document, options: PlanOptions, planned: Plan
) -> Iterator[tuple[str, Document, PlanOptions]]:
    if options.wrapper is Wrapper.DDP and not options.distributed_optimizer:
        yield "--distributed-optimizer", document, replace(options, distributed_optimizer=True)
    everything = ShardingStrategy.OPTIM_GRADS_PARAMS
    if planned.sharding_strategy not in (None, everything):
        yield f"--sharding-strategy {everything}", document, replace(options, sharding_strategy=everything)
    # A configuration of another package may hold these fields itself.
    prefix = "transformer." if "transformer" in document.data else ""
    modules = ["moe" if planned.has_experts else "mlp"]
    recomputations: tuple[dict[str, object], ...] = (
        {"recompute_granularity": "selective", "recompute_modules": modules},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    )
    for settings in recomputations:
        values = {f"{prefix}{name}": value for name, value in settings.items()}
        written = " ".join(_write_override(path, value) for path, value in values.items())
        yield written, _apply_settings(document, values), options
    if planned.layout["tp"] > 1:
        yield (
            f"{prefix}sequence_parallel=true",
            _apply_settings(document, {f"{prefix}sequence_parallel": True}),
            options,
        )
    pp, dp = planned.layout["pp"], planned.layout["dp"]
    if dp % 2 == 0:  # on as many GPUs
        longer = deepcopy(document)
        apply_layout(longer, {"pp": 2 * pp})
        yield f"--pp {2 * pp} --dp {dp // 2}", longer, options
    if options.batch.micro_batch_size > 1:
        yield "--micro-batch-size 1", document, replace(options, batch=replace(options.batch, micro_batch_size=1))


def _write_override(path: str, value: object) -> str:
    """Write an override as it can be pasted into a shell."""
    return shlex.quote(f"{path}={f'[{", ".join(value)}]' if isinstance(value, list) else value}")


def _apply_settings(document: Document, values: dict[str, object]) -> Document:
    changed = deepcopy(document)
    for path, value in values.items():
        changed.set(path, value)
    return changed
