"""Compare the inputs of all ranks through the store before a collective would hang on a difference.

The first rank publishes its facts and their fingerprint. Every other rank answers with its differences, if any. The
first rank then publishes all differences. Messages have constant size if ranks agree, waits are bounded, and every rank
learns of every problem.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import importlib.metadata
import json
import platform
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypedDict

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._C._distributed_c10d import Store
from torch.distributed.distributed_c10d import _get_default_store

from bridge.config import ModelConfig
from bridge.dist.errors import AgreementError

# Longer than ranks drift apart while one of them loads data, and short enough to fail a hung run early.
LONGEST_WAIT = timedelta(minutes=10)
# After the first problem, ranks that have not answered yet get only this long.
_GRACE = timedelta(seconds=5)
_PACKAGES = (
    "bridge-config",
    "bridge-builders",
    "bridge-dist",
    "bridge-models",
    "megatron-core",
    "torch",
    "transformer-engine",
    "nvidia-modelopt",
)
_MOST_FIELDS = 20
_LONGEST_VALUE = 60

Facts = Mapping[str, str]
"""Values as JSON, by the path of their field."""


class _Problems(TypedDict):
    """Differing values by field and rank, and the ranks that did not answer."""

    values: dict[str, dict[str, str]]
    silent: list[int]


def collect_facts(**subjects: object) -> Facts:
    """Collect the values to compare from configurations, options and sizes.

    A ``ModelConfig`` is compared by its document. Values that the document omits, such as a hook without a name, are
    compared by their path only. Other objects without a plain form are compared by their class.
    """
    return {path: json.dumps(value, sort_keys=True) for path, value in _flatten(_convert_to_plain(subjects))}


def collect_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that affect a build."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def agree_in_world(mine: Facts, *, timeout: timedelta = LONGEST_WAIT) -> None:
    """Compare facts between all ranks of the initialised world. Collective, through its store.

    Raises:
        AgreementError: On every rank, when they differ or a rank does not answer in time.
    """
    if is_alone():
        return
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    agree(mine, store=_get_default_store(), rank=rank, world_size=world_size, timeout=timeout)


def agree_in_groups(mine: Facts, pg_collection: ProcessGroupCollection, *, timeout: timedelta = LONGEST_WAIT) -> None:
    """Compare facts between all ranks that build one model, which need not be the whole world.

    Facts are compared along one kind of parallelism after the other. Problems are passed on, so that every rank knows
    them after the last one.

    Raises:
        AgreementError: On every rank, when they differ or a rank does not answer in time.
    """
    if is_alone():
        return
    problems = _Problems(values={}, silent=[])
    for turn, group in enumerate((pg_collection.tp, pg_collection.dp_cp, pg_collection.pp)):
        # A rank that waited in vain enters the next group late and must not be reported as the missing one.
        patience = timeout + turn * 3 * _GRACE
        ranks = torch.distributed.get_process_group_ranks(group)
        problems = _exchange(
            mine,
            problems,
            store=_get_default_store(),
            name=hashlib.sha256(str(ranks).encode()).hexdigest()[:16],
            rank=torch.distributed.get_rank(),
            ranks=ranks,
            timeout=patience,
        )
    _raise_if_any(problems, timeout)


def agree(mine: Facts, *, store: Store, rank: int, world_size: int, timeout: timedelta = LONGEST_WAIT) -> None:
    """Compare facts between all ranks that share a store; every one of them calls this.

    Args:
        mine: The facts of this rank.
        store: The shared store.
        rank: This rank.
        world_size: Number of ranks. Ranks that were given another number still meet.
        timeout: How long to wait for the others.

    Raises:
        AgreementError: On every rank, when they differ or a rank does not answer in time.
    """
    problems = _Problems(values={}, silent=[])
    ranks = range(world_size)
    problems = _exchange(mine, problems, store=store, name="world", rank=rank, ranks=ranks, timeout=timeout)
    _raise_if_any(problems, timeout)


def is_alone() -> bool:
    """Return whether there are no other ranks to compare with; those of a fake world do not exist."""
    distributed = torch.distributed
    return not distributed.is_initialized() or distributed.get_world_size() == 1 or distributed.get_backend() == "fake"


def _exchange(
    mine: Facts,
    problems: _Problems,
    *,
    store: Store,
    name: str,
    rank: int,
    ranks: Sequence[int],
    timeout: timedelta,
) -> _Problems:
    """Exchange problems with the other ranks and return those of all.

    Raises:
        AgreementError: The connection to the store was lost.
    """
    if len(ranks) == 1:
        return problems
    try:
        group = f"bridge/agreement/{name}"
        # Ranks call this in the same order, so the number of the call identifies the exchange.
        turn = store.add(f"{group}/turns/{rank}", 1)
        if rank == ranks[0]:
            return _ask(mine, problems, store=store, group=group, turn=turn, ranks=ranks, timeout=timeout)
        return _answer(mine, problems, store=store, at=f"{group}/{turn}", rank=rank, first=ranks[0], timeout=timeout)
    except torch.distributed.DistNetworkError as error:
        raise AgreementError(
            "lost the connection to the store of the job: rank 0 or the launcher has ended; see its output"
        ) from error


def _ask(
    mine: Facts,
    problems: _Problems,
    *,
    store: Store,
    group: str,
    turn: int,
    ranks: Sequence[int],
    timeout: timedelta,
) -> _Problems:
    at = f"{group}/{turn}"
    store.set(f"{at}/facts", json.dumps(mine))
    store.set(f"{at}/fingerprint", _fingerprint(mine))
    deadline = time.monotonic() + timeout.total_seconds()
    for other in ranks[1:]:
        answer = _wait_for_key(store, f"{at}/answer/{other}", deadline)
        if answer is None:
            problems["silent"].append(other)
        elif answer:
            problems = _merge(problems, json.loads(answer))
        if problems["values"] or problems["silent"]:
            deadline = min(deadline, time.monotonic() + _GRACE.total_seconds())
    store.set(f"{at}/verdict", json.dumps(problems))
    if problems["values"] or problems["silent"]:
        # This rank may host the store and is about to fail: let the others read the verdict first.
        deadline = time.monotonic() + _GRACE.total_seconds()
        for other in ranks[1:]:
            if other not in problems["silent"]:
                _wait_for_key(store, f"{at}/read/{other}", deadline)
    if not problems["silent"]:  # every rank has finished the previous turn: delete its keys
        for name in ("facts", "fingerprint", "verdict", *(f"answer/{other}" for other in ranks[1:])):
            store.delete_key(f"{group}/{turn - 1}/{name}")
    return problems


def _answer(
    mine: Facts,
    problems: _Problems,
    *,
    store: Store,
    at: str,
    rank: int,
    first: int,
    timeout: timedelta,
) -> _Problems:
    deadline = time.monotonic() + timeout.total_seconds()
    fingerprint = _wait_for_key(store, f"{at}/fingerprint", deadline)
    if fingerprint is None:
        return _merge(problems, _Problems(values={}, silent=[first]))
    if fingerprint.decode() != _fingerprint(mine):
        theirs = json.loads(store.get(f"{at}/facts"))
        problems = _merge(problems, _Problems(values=_compare(mine, rank, theirs, first), silent=[]))
    known = problems["values"] or problems["silent"]
    store.set(f"{at}/answer/{rank}", json.dumps(problems) if known else "")
    verdict = _wait_for_key(store, f"{at}/verdict", deadline + 2 * _GRACE.total_seconds())
    if verdict is None:
        return _merge(problems, _Problems(values={}, silent=[first]))
    problems = _merge(problems, json.loads(verdict))
    if problems["values"] or problems["silent"]:
        store.set(f"{at}/read/{rank}", "")
    return problems


def _wait_for_key(store: Store, key: str, deadline: float) -> bytes | None:
    """Wait for a key and return its value; None on timeout."""
    try:
        store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), 0.05)))
    except torch.distributed.DistNetworkError:
        raise
    except RuntimeError:  # other stores have no specific timeout error
        return None
    value: bytes = store.get(key)
    return value


def _compare(mine: Facts, rank: int, theirs: Facts, other: int) -> dict[str, dict[str, str]]:
    return {
        path: {str(other): theirs.get(path, "absent"), str(rank): mine.get(path, "absent")}
        for path in dict.fromkeys((*theirs, *mine))
        if theirs.get(path) != mine.get(path)
    }


def _merge(one: _Problems, other: _Problems) -> _Problems:
    values = {path: one["values"].get(path, {}) | ranks for path, ranks in other["values"].items()}
    return _Problems(values=one["values"] | values, silent=sorted({*one["silent"], *other["silent"]}))


def _raise_if_any(problems: _Problems, timeout: timedelta) -> None:
    lines = [f"{path} is {_format_by_rank(ranks)}" for path, ranks in problems["values"].items()]
    if len(lines) > _MOST_FIELDS:
        lines[_MOST_FIELDS:] = [f"and {len(lines) - _MOST_FIELDS} more"]
    if problems["silent"]:
        waited = f"{timeout.total_seconds():g} s, or {_GRACE.total_seconds():g} s after the first problem"
        lines.append(f"{_format_ranks(problems['silent'])} did not answer within {waited}")
    if lines:
        raise AgreementError("the ranks do not agree on what to build:\n  " + "\n  ".join(lines))


def _format_by_rank(ranks: dict[str, str]) -> str:
    """Format values by rank, such as ``4 on rank 0, 8 on ranks 1, 3``."""
    by_value: dict[str, list[int]] = {}
    for rank, value in sorted(ranks.items(), key=lambda item: int(item[0])):
        shown = value if len(value) <= _LONGEST_VALUE else value[:_LONGEST_VALUE] + "..."
        by_value.setdefault(shown, []).append(int(rank))
    return ", ".join(f"{value} on {_format_ranks(holders)}" for value, holders in by_value.items())


def _format_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _fingerprint(mine: Facts) -> str:
    return hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _convert_to_plain(value: object) -> Any:
    """Convert a value to JSON types, equal in every process that uses an equal value."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, ModelConfig):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about omitted values: reported where the document is written
            document = value.as_dict()
        if omitted := document.get("_omitted_"):  # the reasons contain addresses of this process
            document["_omitted_"] = sorted(entry["path"] for entry in omitted)
        return _convert_to_plain(document)
    if isinstance(value, Mapping):
        return {str(key): _convert_to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_convert_to_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, torch.dtype | timedelta):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _convert_to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
