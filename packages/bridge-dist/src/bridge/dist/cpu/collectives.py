"""Collectives of gloo in place of NCCL's: each has ended when it returns, and takes what only NCCL takes."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.distributed_c10d import _CoalescingManager

from bridge.dist.internals import TESTED_THROUGHOUT, TORCH
from bridge.dist.patch import Replacement


def _wait_for(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that has ended when it returns, asynchronous or not.

    A stream frees memory after the collectives that use it; on the CPU it is gone at once. Megatron-FSDP (megatron-core
    0.19.2) frees what it gathers ahead, and gloo's thread would write into it.
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
    """Gather parts of different sizes too, as expert-tensor parallelism does; gloo takes only equal ones."""
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
    """The same in the other direction."""
    if len({each.shape for each in parts}) == 1:
        return _wait_for(torch.distributed.reduce_scatter)(output, parts, op, group, **kwargs)
    whole = torch.cat(parts)
    torch.distributed.all_reduce(whole, op, group=group)
    output.copy_(whole.split([len(each) for each in parts])[torch.distributed.get_rank(group)])
    return None


@contextlib.contextmanager
def skip_coalescing(*_: object, **__: object) -> Iterator[_CoalescingManager]:
    """In place of torch's manager, which sends several tensors at once: here each goes by itself, and has arrived.

    gloo packs what is sent at once into one tensor of the first one's type (seen in torch 2.15), so that parameters of
    different precision come back wrong.
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

# By name: those that end in `_single` are what their older spellings call in newer versions of torch.
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
"""What is called in place of each collective."""


def replace_group_methods() -> Iterator[Replacement]:
    """What collectives call, for torch 2.6, where they do not ask function modes: `COLLECTIVES` would be ignored."""
    if TORCH < TESTED_THROUGHOUT:
        group = torch.distributed.ProcessGroup
        for name in _GROUP_METHODS:
            yield Replacement(group, name, _wait_for(getattr(group, name)))
