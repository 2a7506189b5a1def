"""Checks of Megatron's global process groups, which some of its components use instead of the groups they are given."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import get_process_group_ranks

from bridge.models.errors import UnsupportedError


def check_global_groups(pg_collection: ProcessGroupCollection, *, component: str) -> None:
    """Check that Megatron's global tensor-parallel group has the same ranks as the given one.

    Args:
        pg_collection: The process groups of this rank.
        component: The component that uses the global group, for the error message.

    Raises:
        UnsupportedError: There is no global group, or it has other ranks.
    """
    global_group = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
    if global_group is None or get_process_group_ranks(global_group) != get_process_group_ranks(pg_collection.tp):
        raise UnsupportedError(
            f"{component} uses Megatron's global process groups and ignores those it is given: create them for this "
            "layout with bridge.dist.create_process_groups, and pass its result"
        )
