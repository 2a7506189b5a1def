"""Running a stage of a language model on a microbatch of tokens."""

from __future__ import annotations

from typing import Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.core.utils import get_batch_on_this_cp_rank


class ForwardStep(Protocol):
    """Runs a stage on a microbatch: see ``DistributedModelBuilder.forward_step``."""

    def __call__(
        self, stage: MegatronModule, tokens: torch.Tensor, pg_collection: ProcessGroupCollection
    ) -> torch.Tensor: ...


def next_token_step(stage: MegatronModule, tokens: torch.Tensor, pg_collection: ProcessGroupCollection) -> torch.Tensor:
    """Run a stage of a decoder that predicts each token from the previous ones.

    Args:
        stage: A stage, wrapped or not.
        tokens: [microbatch, sequence + 1].
        pg_collection: The process groups of this rank.

    Returns:
        On the last stage the losses, shape [microbatch, this context-parallel rank's part of the sequence]; on other
        stages the input of the next one.
    """
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    batch = _take_part(inputs, pg_collection, labels=labels)
    output: torch.Tensor = stage(batch["inputs"], batch["positions"], None, labels=batch["labels"])
    return output


def decoder_logits_step(
    stage: MegatronModule, tokens: torch.Tensor, pg_collection: ProcessGroupCollection
) -> torch.Tensor:
    """Run a stage of a decoder on tokens, shape [microbatch, sequence], and compute logits on the last stage."""
    batch = _take_part(tokens, pg_collection)
    output: torch.Tensor = stage(batch["inputs"], batch["positions"], None)
    return output


def _take_part(
    inputs: torch.Tensor, pg_collection: ProcessGroupCollection, **more: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return this context-parallel rank's part of a batch, with the positions of its tokens in the whole sequence."""
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs).contiguous()
    batch = {"inputs": inputs, "positions": positions, **more}
    if pg_collection.cp.size() > 1:
        batch = get_batch_on_this_cp_rank(batch, False, cp_group=pg_collection.cp)
    return batch
