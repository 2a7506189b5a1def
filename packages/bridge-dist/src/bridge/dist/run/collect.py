"""Collection of every rank's stages, peak memory and step times into one report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import mean
from typing import NamedTuple

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

from bridge.config import ModelConfig
from bridge.dist.checkpoint.together import gather
from bridge.dist.checks.agreement import collect_versions
from bridge.dist.engine.placement import Placement, list_layer_indices
from bridge.dist.engine.stages import identify_layers
from bridge.dist.job import BuildJob, get_vocab_size
from bridge.dist.layout import Layout
from bridge.dist.run.execute import BuiltRank
from bridge.dist.run.peak_memory import PeakMemory, read_peak_memory
from bridge.dist.run.report import BuildReport, ChunkReport, RankReport
from bridge.dist.train.flops import count_model_flops, find_peak_flops
from bridge.dist.train.step import Step
from bridge.dist.wrapper import resolve_sharding_strategy


def collect_report(
    job: BuildJob, config: ModelConfig, run: BuiltRank, layout: Layout, groups: ProcessGroupCollection
) -> BuildReport:
    """Collect every rank's stages, peak memory and step times. Collective."""
    memory = read_peak_memory()
    chunks = [_make_chunk_report(index, stage, run.placements[index]) for index, stage in enumerate(run.stages)]
    placements = [placement for stage in run.placements for placement in stage]
    everyone = gather(_Outcome(_make_rank_report(groups, chunks, memory), placements, _average_seconds(run.steps)))
    whole = {placement.full_name: placement for outcome in everyone for placement in outcome.placements}
    shapes = {name: placement.logical_shape(get_vocab_size(config)) for name, placement in whole.items()}
    transformer, training = job.make_builder(config).transformer_config, job.training
    loaded = job.weights or job.checkpoint or job.modelopt_checkpoint
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    in_half_precision = transformer.bf16 or transformer.fp16
    return BuildReport(
        world_size=layout.world_size,
        layout=asdict(layout),
        wrap=str(job.wrapper),
        distributed_optimizer=job.distributed_optimizer,
        sharding_strategy=resolve_sharding_strategy(job.wrapper, job.sharding_strategy),
        weights=None if loaded is None else str(loaded),
        layers=identify_layers(run.stages),
        fusions=list(job.fusions),
        device="cpu" if device is None else "cuda",
        device_name=device,
        device_peak_flops=find_peak_flops(device) if device is not None and in_half_precision else None,
        **{size: getattr(training, size, None) for size in ("seq_length", "micro_batch_size", "global_batch_size")},
        parameters=sum(shape.numel() for shape in shapes.values()),
        padded_parameters=sum(placement.full_shape.numel() for placement in whole.values()),
        ranks=[outcome.report for outcome in everyone],
        iteration=run.iteration,
        saved=None if job.save is None else str(job.save),
        losses=[step.loss for step in run.steps],
        grad_norms=[step.grad_norm for step in run.steps],
        step_seconds=max((outcome.step_seconds for outcome in everyone if outcome.step_seconds), default=None),
        model_flops=None if training is None else count_model_flops(shapes, transformer, training),
        document=job.document,
        overrides=list(job.overrides),
        versions=collect_versions(),
    )


def _make_chunk_report(index: int, stage: MegatronModule, placements: list[Placement]) -> ChunkReport:
    return ChunkReport(
        vp_stage=index,
        layers=list_layer_indices(stage),
        parameters=sum(placement.shape.numel() for placement in placements),
        wrappers=list(list_wrapper_names(stage)),
    )


def list_wrapper_names(module: torch.nn.Module) -> Iterator[str]:
    """Yield the class names of a stage's wrappers, outermost first, and of the model inside."""
    yield type(module).__name__
    inner = getattr(module, "module", None)
    if isinstance(inner, torch.nn.Module):
        yield from list_wrapper_names(inner)


def _make_rank_report(groups: ProcessGroupCollection, chunks: list[ChunkReport], memory: PeakMemory) -> RankReport:
    return RankReport(
        rank=torch.distributed.get_rank(),
        tp=groups.tp.rank(),
        pp=groups.pp.rank(),
        dp=groups.dp.rank(),
        cp=groups.cp.rank(),
        ep=groups.ep.rank(),
        chunks=chunks,
        peak_memory_bytes=memory,
    )


class _Outcome(NamedTuple):
    """A rank's contribution to the report: its own report, placements of its parameters, mean step time."""

    report: RankReport
    placements: list[Placement]
    step_seconds: float | None


def _average_seconds(steps: Sequence[Step]) -> float | None:
    """Return the mean step time without the first step, which warms up; None if there is no other."""
    return mean(step.seconds for step in steps[1:]) if len(steps) > 1 else None
