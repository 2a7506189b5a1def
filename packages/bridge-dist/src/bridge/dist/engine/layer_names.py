"""Check that each layer of a pipeline has a name of its own in the whole model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

from bridge.dist.checks.agreement import is_alone
from bridge.dist.engine.placement import named_parameters
from bridge.dist.errors import BuilderContractError

_LAYER = re.compile(r"(?!mtp\.).*?\blayers\.\d+(?=\.)")
_MOST_NAMES = 5


def check_layer_names(stages: Sequence[MegatronModule], pg_collection: ProcessGroupCollection) -> None:
    """Check that no two stages have a layer of the same name. Collective over the ranks of a pipeline.

    Initial weights and checkpoints go by these names. megatron-core 0.19.2 refuses such a checkpoint on the first rank
    only, while the others wait.

    Raises:
        BuilderContractError: On every rank, naming the layers.
    """
    if is_alone() or pg_collection.pp.size() == 1:
        return
    everyone: list[list[str]] = [[] for _ in range(pg_collection.pp.size())]
    mine = [name for stage in stages for name in _list_layers(stage, pg_collection)]
    torch.distributed.all_gather_object(everyone, mine, group=pg_collection.pp)
    counts = Counter(name for names in everyone for name in names)
    if twice := [name for name, count in counts.items() if count > 1]:
        names = ", ".join([*twice[:_MOST_NAMES], *(["..."] if len(twice) > _MOST_NAMES else [])])
        raise BuilderContractError(
            f"pipeline stages have different layers of the same name: {names}; give each layer the attribute "
            "layer_number, its place in the whole model, counted from 1"
        )


def _list_layers(stage: MegatronModule, pg_collection: ProcessGroupCollection) -> list[str]:
    """Return the names of a stage's layers in the whole model."""
    names = (named.placement.full_name for named in named_parameters(stage, pg_collection))
    return list(dict.fromkeys(found[0] for name in names if (found := _LAYER.match(name))))
