"""Process groups that Megatron keeps for the whole process, which some of it takes whatever it is given."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import get_process_group_ranks

from bridge.models.errors import UnsupportedError


def check_global_groups(pg_collection: ProcessGroupCollection, *, who: str) -> None:
    """Check that the tensor-parallel ranks are those that Megatron knows of, for something that goes by these.

    Args:
        pg_collection: The process groups of this rank.
        who: What takes Megatron's, for the error.

    Raises:
        UnsupportedError: They are others.
    """
    known = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
    if known is None or get_process_group_ranks(known) != get_process_group_ranks(pg_collection.tp):
        raise UnsupportedError(
            f"{who} takes Megatron's global process groups, whatever it is given: create them for this layout "
            "(bridge.dist.create_process_groups), and pass those"
        )
