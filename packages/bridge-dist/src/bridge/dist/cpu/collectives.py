"""gloo collectives with the interface of NCCL: they finish before they return, and accept unequal parts."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.distributed_c10d import _CoalescingManager

from bridge.dist.internals import TESTED_THROUGHOUT, TORCH
from bridge.dist.patch import Replacement


def _wait_for(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Return a collective that finishes before it returns, asynchronous or not.

    On a GPU, streams keep memory alive until the collectives that use it are done; on the CPU it is freed at once.
    Megatron-FSDP (megatron-core 0.19.2) frees prefetched buffers while gloo's thread still writes to them.
    """

    def wait_for_work(*args: Any, **kwargs: Any) -> Any:
        work = collective(*args, **kwargs)
        if type(work) is torch.distributed.Work:
            work.wait()
        return work

    return wait_for_work


def _all_gather(
    parts: list[torch.Tensor], part: torch.Tensor, group: torch.distributed.ProcessGroup | None = None, **kwargs: Any
) -> Any:
    """All-gather with unequal parts, which gloo lacks and expert-tensor parallelism uses."""
    if len({each.shape for each in parts}) == 1:
        return _wait_for(torch.distributed.all_gather)(parts, part, group, **kwargs)
    parts[torch.distributed.get_rank(group)].copy_(part)
    for rank, each in enumerate(parts):
        torch.distributed.broadcast(each, group=group, group_src=rank)
    return None


def _reduce_scatter(
    output: torch.Tensor,
    parts: list[torch.Tensor],
    op: Any = torch.distributed.ReduceOp.SUM,
    group: torch.distributed.ProcessGroup | None = None,
    **kwargs: Any,
) -> Any:
    """Reduce-scatter with unequal parts, which gloo lacks."""
    if len({each.shape for each in parts}) == 1:
        return _wait_for(torch.distributed.reduce_scatter)(output, parts, op, group, **kwargs)
    whole = torch.cat(parts)
    torch.distributed.all_reduce(whole, op, group=group)
    output.copy_(whole.split([len(each) for each in parts])[torch.distributed.get_rank(group)])
    return None


@contextlib.contextmanager
def skip_coalescing(*_: object, **__: object) -> Iterator[_CoalescingManager]:
    """Replace torch's coalescing manager: each collective runs by itself and finishes at once.

    gloo packs coalesced tensors into one tensor of the first one's dtype (seen in torch 2.15), which corrupts
    parameters of another precision.
    """
    yield _CoalescingManager()


_GROUP_METHODS = (
    "_allgather_base",
    "_reduce_scatter_base",
    "allgather",
    "allreduce",
    "alltoall",
    "alltoall_base",
    "broadcast",
    "reduce",
    "reduce_scatter",
)

# Looked up by name: newer versions of torch add functions ending in `_single`, which the older ones call.
_FUNCTIONS = [
    getattr(torch.distributed, name)
    for name in (
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_single",
        "all_reduce",
        "all_to_all",
        "all_to_all_single",
        "broadcast",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_single",
        "reduce_scatter_tensor",
    )
    if hasattr(torch.distributed, name)
]

COLLECTIVES: Mapping[object, Callable[..., Any]] = {
    **{collective: _wait_for(collective) for collective in _FUNCTIONS},
    torch.distributed.all_gather: _all_gather,
    torch.distributed.reduce_scatter: _reduce_scatter,
}
"""The replacement of each collective."""


def replace_group_methods() -> Iterator[Replacement]:
    """Yield replacements for the methods that collectives call in torch 2.6, which bypasses function modes there."""
    if TORCH < TESTED_THROUGHOUT:
        group = torch.distributed.ProcessGroup
        for name in _GROUP_METHODS:
            yield Replacement(group, name, _wait_for(getattr(group, name)))
