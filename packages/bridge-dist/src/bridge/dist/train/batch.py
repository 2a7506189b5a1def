"""The batch of a training step and its division over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer import TransformerConfig

from bridge.dist.errors import TrainingError
from bridge.dist.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The sizes of a batch: tokens per sample, samples per step over all ranks, and samples per forward pass."""

    seq_length: int
    global_batch_size: int = 8
    micro_batch_size: int = 1

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
                f"{self.micro_batch_size} on dp = {layout.dp} ranks: choose a multiple of {per_round}"
            )
        microbatches = self.global_batch_size // per_round
        if layout.vp > 1 and layout.pp > 1:
            _check_groups(microbatches, group_size or layout.pp, layout.pp)
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
                f"choose a multiple of {parts}"
            )


def _check_groups(microbatches: int, group_size: int, pp: int) -> None:
    """Check the number of microbatches as Megatron's interleaved schedule does in the first step (0.19.2)."""
    rest = microbatches % group_size
    if microbatches < group_size or 0 < rest < pp:
        rule = f"a multiple of {group_size}"
        if group_size != pp:
            rule = (
                f"at least {group_size} (microbatch_group_size_per_vp_stage), with a remainder of 0 or "
                f"{pp} to {group_size - 1}"
            )
        raise TrainingError(
            f"a virtual pipeline on pp = {pp} needs a number of microbatches that is {rule}, got {microbatches}: "
            "choose another global or micro batch size"
        )
