"""Save the stages of all ranks as a Megatron checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

from bridge.config import ModelConfig
from bridge.dist.checkpoint.common import make_common_state
from bridge.dist.checkpoint.document import describe_model, write_documents
from bridge.dist.checkpoint.folder import TRACKER, name_iteration
from bridge.dist.checkpoint.optimizer import make_saving_state
from bridge.dist.checkpoint.partial import claim, finish, name_partial, replace_file
from bridge.dist.checkpoint.progress import Progress
from bridge.dist.checkpoint.random_states import KEY, collect_random_states
from bridge.dist.checkpoint.state import (
    SHARDING_TYPE,
    add_groups,
    check_wrapper,
    gather_updated_parameters,
    make_content_metadata,
    make_model_state,
    uses_distributed_optimizer,
)
from bridge.dist.checkpoint.together import raise_together
from bridge.dist.checkpoint.tokenizer import TOKENIZER, carry_files
from bridge.dist.checkpoint.write import measure, write
from bridge.dist.errors import CheckpointError


def save_checkpoint(
    stages: Sequence[MegatronModule],
    folder: str | Path,
    pg_collection: ProcessGroupCollection,
    *,
    model: ModelConfig,
    progress: Progress,
    optimizer: Any = None,
    tokenizer: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Save the stages of all ranks in megatron-core's format torch_dist, laid out as Megatron-LM and Bridge expect.

    Collective over all ranks. The iteration gets its name when it is complete, and the tracker file names it last: a
    run that dies leaves ``iter_NNNNNNN.partial``, which nothing takes for a checkpoint and the next run replaces.

    Args:
        stages: The stages of this rank, wrapped or not.
        folder: The folder of all iterations.
        pg_collection: The process groups of this rank.
        model: The configuration of the model, written as a document and as Megatron Bridge's ``run_config.yaml``.
        progress: Steps taken, which is Megatron's iteration, and samples trained on, after which data go on.
        optimizer: Megatron's optimizer of the stages; None to save only weights.
        tokenizer: A folder whose tokenizer's files are kept, so that the weights can be exported with them.
        force: Replace an iteration of this number.

    Returns:
        The folder of the iteration.

    Raises:
        CheckpointError: The iteration exists, another run writes it, a rank cannot, or the stages cannot be saved.
    """
    iteration = Path(folder) / name_iteration(progress.step)
    partial = name_partial(iteration)
    is_first = torch.distributed.get_rank() == 0
    check_target(folder, progress.step, force=force)
    with raise_together():
        check_wrapper(stages)
        if is_first:
            claim(iteration)
    gather_updated_parameters(stages, optimizer)
    content = make_content_metadata(distributed_optimizer=optimizer is not None and uses_distributed_optimizer(stages))
    state = _collect_state(stages, pg_collection, model, optimizer, progress, content)
    target = measure(state, partial)
    write(state, target, content=content)
    with raise_together(), target.explain_failure():
        if is_first:
            write_documents(describe_model(model), partial, has_optimizer=optimizer is not None, has_random_states=True)
            if tokenizer is not None:
                carry_files(Path(tokenizer), partial / TOKENIZER)
            finish(iteration)
            replace_file(iteration.parent / TRACKER, str(progress.step))
    return iteration


def _collect_state(
    stages: Sequence[MegatronModule],
    pg_collection: ProcessGroupCollection,
    model: ModelConfig,
    optimizer: Any,
    progress: Progress,
    content: dict[str, Any],
) -> dict[str, Any]:
    """Return the sharded state dict of this rank: model, optimizer, random states and what all ranks share."""
    metadata = add_groups(content, pg_collection)
    parameters = make_model_state(stages, metadata)
    saved_optimizer = {} if optimizer is None else make_saving_state(optimizer, parameters, metadata=metadata)
    common = make_common_state(
        model,
        stages[0].config,
        step=progress.step,
        samples=progress.samples,
        world_size=torch.distributed.get_world_size(),
        tp=pg_collection.tp.size(),
        pp=pg_collection.pp.size(),
        dp=pg_collection.dp.size(),
        distributed_optimizer=SHARDING_TYPE in content,
        **({"no_save_optim": True} if optimizer is None else {}),
    )
    return {**parameters.state, **saved_optimizer, KEY: collect_random_states(pg_collection), **common}


def check_target(folder: str | Path, step: int, *, force: bool = False) -> None:
    """Check that a checkpoint of this step can be written, before training for it. Collective over all ranks.

    Raises:
        CheckpointError: There is one and ``force`` is not set, or the folder cannot be made.
    """
    with raise_together():
        if torch.distributed.get_rank() == 0:
            iteration = Path(folder) / name_iteration(step)
            if iteration.exists() and not force:
                raise CheckpointError(f"{iteration} exists: save to another folder, or replace it with --force")
            iteration.parent.mkdir(parents=True, exist_ok=True)
