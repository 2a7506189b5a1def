"""Differences between training on several ranks and on one process: losses, gradient norms and final weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import gather_and_compute_chunk_metadata
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from torch.distributed.tensor import DTensor

from bridge.dist.checkpoint.together import gather
from bridge.dist.engine.forward import ForwardStep
from bridge.dist.engine.placement import Placement
from bridge.dist.engine.stages import strip_wrappers
from bridge.dist.job import BuildJob
from bridge.dist.layout import Layout
from bridge.dist.run.devices import forbid_tf32
from bridge.dist.run.execute import BuiltRank, build_and_train
from bridge.dist.run.rank import join_job
from bridge.dist.train.logits import compute_logits
from bridge.dist.train.optimizer import LEARNING_RATE


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Losses and gradient norms of a training run, and the difference of its final weights from the expected ones.

    ``weight_difference`` is the largest over parameters, and belongs to ``parameter``: the root mean square of the
    difference over its elements, relative to the distance Adam moves an element in these steps plus rounding.
    """

    losses: list[float]
    grad_norms: list[float | None]
    weight_difference: float
    parameter: str
    logits_difference: float | None = None
    """The largest difference of the first logits from the expected ones, relative to the largest of those."""


def train_reference(job: BuildJob, weights: Path) -> TrainingResult:
    """Train on one rank and write the final weights to a file."""
    forbid_tf32()
    with join_job(job) as (config, layout, groups):
        run = build_and_train(job, config, layout, groups)
        save_weights(run, weights)
        return compare_weights(run, weights)


def train_and_compare(job: BuildJob, weights: Path, logits: Path | None = None) -> TrainingResult:
    """Train as one of several ranks and compare the final weights with those of a file. Collective.

    Args:
        job: The job.
        weights: The file of ``train_reference``.
        logits: Tokens and the logits that the model must compute before it is trained; None to compare none.
    """
    forbid_tf32()
    differences: list[float] = []
    with join_job(job) as (config, layout, groups):

        def compare(stages: list[MegatronModule]) -> None:
            if logits is not None:
                step = job.make_builder(config).logits_step
                differences.append(compare_logits(stages, groups, layout, logits, logits_step=step))

        run = build_and_train(job, config, layout, groups, before_training=compare)
        result = compare_weights(run, weights)
    return replace(result, logits_difference=differences[0] if differences else None)


def compare_logits(
    stages: list[MegatronModule],
    groups: ProcessGroupCollection,
    layout: Layout,
    expected: Path,
    *,
    logits_step: ForwardStep,
) -> float:
    """Return the largest relative difference of the logits of a model from those of a file. Collective."""
    saved = torch.load(expected, map_location="cpu", mmap=True, weights_only=True)
    for stage in stages:
        stage.eval()
    logits = compute_logits(stages, groups, layout, saved["tokens"].unsqueeze(1), logits_step=logits_step)
    for stage in stages:
        stage.train()
    difference = 0.0  # on stages without logits
    if logits is not None:
        theirs = saved["logits"]
        ours = logits[..., : theirs.shape[-1]].float().cpu()
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    return max(gather(math.inf if math.isnan(difference) else difference))


def save_weights(run: BuiltRank, file: Path) -> None:
    """Write the weights of a single rank under their names in the whole model."""
    torch.save({placement.full_name: weight for placement, weight in _iter_final_weights(run)}, file)


def compare_weights(run: BuiltRank, weights: Path) -> TrainingResult:
    """Compare each rank's part of the final weights with the file of ``save_weights``. Collective."""
    reference = torch.load(weights, map_location="cpu", mmap=True, weights_only=True)
    # Pairs compare by the difference first, so that max() finds the largest.
    mine = [
        (
            _measure_difference(weight, reference[placement.full_name], placement, steps=len(run.steps)),
            placement.full_name,
        )
        for placement, weight in _iter_final_weights(run)
    ]
    difference, parameter = max(gather(max(mine)))
    return TrainingResult(
        losses=[step.loss for step in run.steps],
        grad_norms=[step.grad_norm for step in run.steps],
        weight_difference=difference,
        parameter=parameter,
    )


def _iter_final_weights(run: BuiltRank) -> Iterator[tuple[Placement, torch.Tensor]]:
    for stage, placements in zip(run.stages, run.placements, strict=True):
        # Not parameters(): with Megatron-FSDP they hold the weights of the last forward pass, before the last update.
        state = {strip_wrappers(name): value for name, value in stage.state_dict().items()}
        for placement in placements:
            yield placement, state[placement.name].detach()


def _measure_difference(weight: torch.Tensor, reference: torch.Tensor, placement: Placement, *, steps: int) -> float:
    local, expected = weight, placement.take_shard(placement.pad(reference))
    if isinstance(weight, DTensor):
        if weight.shape != placement.shape:  # Megatron-FSDP's DTensor spans the tensor-parallel shards
            parts = [
                replace(placement, shard=shard).take_shard(placement.pad(reference))
                for shard in range(placement.shards)
            ]
            expected = torch.cat(parts, dim=placement.dim)
        chunk = gather_and_compute_chunk_metadata(weight)
        local = weight.to_local()
        expected = expected[tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))]
    if not local.numel():
        return 0.0
    # Megatron-FSDP's state dict holds the fp32 master weights; torch FSDP2's holds the model weights.
    coarser = max(local.dtype, reference.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    difference = local.cpu().to(coarser).double() - expected.to(coarser).double()
    rounding = torch.finfo(coarser).eps * _compute_root_mean_square(reference.double())
    relative = _compute_root_mean_square(difference) / (LEARNING_RATE * steps + rounding)
    return math.inf if math.isnan(relative) else relative  # max() could ignore NaN


def _compute_root_mean_square(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()
