"""The batch of a training step and its division over ranks. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bridge.dist.errors import TrainingError
from bridge.dist.layout import Layout
from bridge.dist.nearest import find_nearest, suggest_multiple

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The sizes of a batch: tokens per sample, samples per step over all ranks, and samples per forward pass."""

    seq_length: int
    global_batch_size: int = 8
    micro_batch_size: int = 1

    def check(self, config: TransformerConfig, layout: Layout) -> int:
        """Check that the batch divides over the ranks, and return the number of microbatches of each.

        Raises:
            TrainingError: It does not.
        """
        self.check_sequence(config)
        return self.count_microbatches(layout, group_size=config.microbatch_group_size_per_vp_stage)

    def count_microbatches(self, layout: Layout, *, group_size: int | None = None) -> int:
        """Return the number of microbatches that each rank computes per step.

        Args:
            layout: The sizes.
            group_size: ``microbatch_group_size_per_vp_stage``; by default the pipeline-parallel size.

        Raises:
            TrainingError: The global batch does not divide into microbatches over the data-parallel ranks, or the
                microbatches do not divide into the groups that a virtual pipeline requires.
        """
        per_round = self.micro_batch_size * layout.dp
        if self.global_batch_size % per_round:
            raise TrainingError(
                f"the global batch of {self.global_batch_size} samples does not divide into microbatches of "
                f"{self.micro_batch_size} on dp = {layout.dp} ranks: choose a multiple of {per_round}, such as "
                f"{suggest_multiple(self.global_batch_size, per_round)}"
            )
        microbatches = self.global_batch_size // per_round
        if layout.vp > 1:
            _check_groups(microbatches, group_size or layout.pp, layout.pp, per_round=per_round)
        return microbatches

    def check_sequence(self, config: TransformerConfig) -> None:
        """Check that samples divide into equal parts under sequence and context parallelism.

        Raises:
            TrainingError: They do not.
        """
        # Each context-parallel rank takes two parts, one from each half of the sample, to balance causal attention.
        parts = 2 * config.context_parallel_size if config.context_parallel_size > 1 else 1
        if config.sequence_parallel:
            parts *= config.tensor_model_parallel_size
        if self.seq_length % parts:
            raise TrainingError(
                f"samples of {self.seq_length} tokens do not divide into {parts} equal parts "
                "(2 x cp with context parallelism, times tp with sequence parallelism): "
                f"choose a multiple of {parts}, such as {suggest_multiple(self.seq_length, parts)}"
            )


def _check_groups(microbatches: int, group_size: int, pp: int, *, per_round: int) -> None:
    """Check the number of microbatches as Megatron's interleaved schedule does in the first step (0.19.2).

    ``per_round`` samples are a microbatch on each data-parallel rank.
    """

    def fits(number: int) -> bool:
        rest = number % group_size
        return number >= group_size and (rest == 0 or rest >= pp)

    if not fits(microbatches):
        rule = f"a multiple of {group_size}"
        if group_size != pp:
            rule = (
                f"at least {group_size} (microbatch_group_size_per_vp_stage), with a remainder of 0 or "
                f"{pp} to {group_size - 1}"
            )
        sizes = find_nearest(microbatches, fits, largest=microbatches + group_size)
        nearest = " or ".join(str(per_round * number) for number in sizes)
        raise TrainingError(
            f"a virtual pipeline on pp = {pp} needs a number of microbatches that is {rule}, got {microbatches}: "
            f"choose a global batch of {nearest} samples, or another micro batch size"
        )
