"""The batch of a training step, and how it divides over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer import TransformerConfig

from bridge.dist.errors import TrainingError
from bridge.dist.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sizes of a batch: of all ranks and of one forward pass, in samples, and of a sample, in tokens."""

    seq_length: int
    global_batch_size: int = 8
    micro_batch_size: int = 1

    def microbatches(self, layout: Layout, *, group_size: int | None = None) -> int:
        """Return how many microbatches each rank computes per step.

        Args:
            layout: The sizes.
            group_size: ``microbatch_group_size_per_vp_stage``, by default the pipeline's size.

        Raises:
            TrainingError: The global batch does not divide into microbatches over the data-parallel ranks, or not into
                the groups that a virtual pipeline takes.
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
        """Check that samples divide into what each rank holds of them.

        Raises:
            TrainingError: They do not, under sequence or context parallelism.
        """
        parts = 2 * config.context_parallel_size if config.context_parallel_size > 1 else 1
        if config.sequence_parallel:
            parts *= config.tensor_model_parallel_size
        if self.seq_length % parts:
            raise TrainingError(
                f"samples of {self.seq_length} tokens do not divide into {parts} equal parts, "
                "2 x cp under context parallelism, times tp under sequence parallelism: "
                f"choose a multiple of {parts}"
            )


def _check_groups(microbatches: int, group_size: int, pp: int) -> None:
    """Refuse what Megatron's interleaved schedule refuses in the first step. Seen in megatron-core 0.19.2."""
    rest = microbatches % group_size
    if microbatches < group_size or 0 < rest < pp:
        group = "" if group_size == pp else f" in groups of {group_size} (microbatch_group_size_per_vp_stage)"
        last = "a multiple of" if group_size == pp else f"and leaves none or {pp} to {group_size - 1} over, at least"
        raise TrainingError(
            f"a virtual pipeline on pp = {pp} takes microbatches{group}, {last} {group_size}; this run has "
            f"{microbatches}: choose another global or micro batch size"
        )
