"""Counting the collectives that a rank calls, by group and operation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup, distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

Sent = Counter[tuple[str, int, str]]
"""Calls or bytes by group, group size and operation."""


class Calls(NamedTuple):
    """Number and total bytes of collectives, by group, group size and operation."""

    number: Sent
    size: Sent

    @classmethod
    def empty(cls) -> Self:
        """Return an empty count."""
        return cls(Counter(), Counter())

    def add(self, other: Calls, times: int = 1) -> None:
        """Add other calls, made ``times`` times."""
        for mine, theirs in zip(self, other, strict=True):
            for key, value in theirs.items():
                mine[key] += value * times

    def __sub__(self, other: Calls) -> Calls:
        """Return these calls minus others."""
        calls = Calls.empty()
        calls.add(self)
        calls.add(other, -1)
        return calls


@dataclass(frozen=True, kw_only=True)
class StepCalls:
    """Collectives of a step: ``first`` with ``microbatches``, and ``more`` per additional round of microbatches."""

    microbatches: int
    first: Calls
    round_size: int = 1
    more: Calls

    def count(self, microbatches: int) -> Calls:
        """Return the collectives of a step with this many microbatches: the first ones and a number of whole rounds."""
        calls = Calls.empty()
        calls.add(self.first)
        calls.add(self.more, (microbatches - self.microbatches) // self.round_size)
        return calls


_NOT_COUNTED = ("recv", "pp send")
"""The other side of each message, and messages in the pipeline: `Work.received` and `Work.passed_on` describe those."""
_FUNCTIONAL = {
    "all_gather_into_tensor": "allgather",
    "all_reduce": "allreduce",
    "all_to_all_single": "alltoall",
    "reduce_scatter_tensor": "reduce_scatter",
}
"""Names of functional collectives, mapped to the names of their in-place counterparts."""


class Collectives(TorchDispatchMode):
    """Counts collectives by group and operation, and the bytes of the larger side of each."""

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = Calls.empty()
        self._names = names

    def take(self) -> Calls:
        """Return the collectives since the last call."""
        taken, self.calls = self.calls, Calls.empty()
        return taken

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        operation = func._schema.name.partition("::")[2]
        if func.namespace == "c10d":
            group = next(ProcessGroup.unbox(argument) for argument in args if is_group(argument))
            # For example `allreduce_` and `_allgather_base_`.
            self._count(group, operation.strip("_").removesuffix("_base"), args)
        elif func.namespace == "_c10d_functional" and operation in _FUNCTIONAL:  # as DTensor does
            # The name of the group is the last string; a reduction has another one before it, such as "sum".
            name: Any = next(argument for argument in reversed(args) if isinstance(argument, str))
            group = vars(distributed_c10d)["_resolve_process_group"](name)
            self._count(group, _FUNCTIONAL[operation], (*args, result))
        return result

    def _count(self, group: ProcessGroup, operation: str, arguments: tuple[Any, ...]) -> None:
        name = self._names.get(group.group_name, "other")
        if group.size() > 1 and operation not in _NOT_COUNTED and f"{name} {operation}" not in _NOT_COUNTED:
            key = (name, group.size(), operation)
            self.calls.number[key] += 1
            self.calls.size[key] += max(map(count_tensor_bytes, arguments))


def count_tensor_bytes(argument: object) -> int:
    """Return the bytes of a tensor, or of all tensors in a list; 0 for anything else."""
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(count_tensor_bytes, argument)) if isinstance(argument, list | tuple) else 0


def list_groups(groups: ProcessGroupCollection) -> list[tuple[str, ProcessGroup]]:
    """Return the process groups of a rank, each with its kind."""
    kinds = ("tp", "cp", "ep", "pp", "dp", "dp_cp", "expt_tp", "expt_dp", "tp_ep", "tp_cp", "embd", "pos_embd", "mp")
    present = [(kind, getattr(groups, kind, None)) for kind in kinds]
    return [(kind, group) for kind, group in present if group is not None]


def map_group_names(groups: ProcessGroupCollection) -> dict[str, str]:
    """Return the kind of each group by its name; a group that serves several kinds gets the first."""
    return {group.group_name: kind for kind, group in reversed(list_groups(groups))}


def is_group(argument: Any) -> bool:
    """Return whether an argument of a torch operation is a process group."""
    return isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())
