"""Advice for a job that does not fit the memory of its GPUs; the effect of each change is planned."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

from bridge.config import BridgeError, Document
from bridge.dist.document_layout import apply_layout
from bridge.dist.plan.plan import PlanOptions, plan
from bridge.dist.plan.results import Plan
from bridge.dist.wrapper import ShardingStrategy, Wrapper


class Advice(NamedTuple):
    """A change in words, and the resulting memory of the largest rank in bytes."""

    change: str
    total_bytes: int


def advise(document: Document, options: PlanOptions, planned: Plan) -> list[Advice]:
    """Return the changes that reduce the memory of the largest rank, most effective first."""
    helpful = []
    for change, changed, other in _propose_changes(document, options, planned):
        try:
            total = plan(changed, other).worst.total_bytes
        except BridgeError:  # the job is not possible with this change
            continue
        if total < planned.worst.total_bytes:
            helpful.append(Advice(change, total))
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
    settings = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    yield (
        " ".join(f"{prefix}{name}={value}" for name, value in settings.items()),
        _apply_settings(document, {f"{prefix}{name}": value for name, value in settings.items()}),
        options,
    )
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


def _apply_settings(document: Document, values: dict[str, object]) -> Document:
    changed = deepcopy(document)
    for path, value in values.items():
        changed.set(path, value)
    return changed
