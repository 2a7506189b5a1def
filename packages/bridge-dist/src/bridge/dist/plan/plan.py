"""An exact plan of a job of any size, made on one CPU: the real stages are built and counted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from megatron.core.transformer import TransformerConfig

from bridge.config import Document, ModelConfig
from bridge.dist.errors import PlanError
from bridge.dist.internals import TESTED_THROUGHOUT, TORCH
from bridge.dist.job import BuildJob, get_vocab_size, make_builder
from bridge.dist.layout import Layout
from bridge.dist.plan.count.microbatch import Memo, PassedShapes
from bridge.dist.plan.count.rank import Rank, measure_rank
from bridge.dist.plan.count.schedule import compute_peak, list_passes
from bridge.dist.plan.request import PlanRequest
from bridge.dist.plan.results import ChunkPlan, Plan, StagePlan, Traffic
from bridge.dist.plan.virtual_rank.rank_order import rank_of
from bridge.dist.train.batch import Batch
from bridge.dist.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Inputs of a plan other than the model; ``gpu_memory`` is in bytes."""

    batch: Batch
    world_size: int
    wrapper: Wrapper = Wrapper.DDP
    distributed_optimizer: bool = False
    gpu_memory: int | None = None


def derive_layout(document: Document, *, gpus: int | None, dp: int | None) -> Layout:
    """Return the layout of a document on some GPUs.

    Args:
        document: Model and layout.
        gpus: Number of GPUs; None for as many as the layout needs with ``dp``.
        dp: Data-parallel size; None to derive it from ``gpus``, else 1.

    Raises:
        LayoutError: The layout does not fit.
    """
    return Layout.of(make_builder(document.config()).transformer_config, gpus, dp=dp)


def get_sequence_length(document: Document) -> int:
    """Return the length of a model's sequences, in tokens.

    Raises:
        PlanError: The model has no ``seq_length``.
    """
    config = document.config()
    length: int | None = getattr(config, "seq_length", None)
    if length is None:
        raise PlanError(f"{type(config).__name__} has no seq_length: pass the sample length with --seq-length")
    return length


def make_plan_options(document: Document, request: PlanRequest) -> PlanOptions:
    """Return the options of a document's plan; by default one microbatch per rank, or two per pipeline stage.

    Raises:
        BridgeError: The layout does not fit, a ModelOpt state is missing, or the model has no ``seq_length``.
    """
    layout = derive_layout(document, gpus=request.gpus, dp=request.dp)
    make_builder(document.config()).check_restore()
    # A multiple of pp, because the interleaved schedule requires one.
    microbatches = 2 * layout.pp if layout.pp > 1 else 1
    return PlanOptions(
        batch=Batch(
            seq_length=request.seq_length or get_sequence_length(document),
            micro_batch_size=request.micro_batch_size,
            global_batch_size=request.global_batch_size or request.micro_batch_size * layout.dp * microbatches,
        ),
        world_size=layout.world_size,
        wrapper=request.wrapper,
        distributed_optimizer=request.distributed_optimizer,
        gpu_memory=request.gpu_memory,
    )


def plan(document: Document, options: PlanOptions, *, memo: Memo | None = None) -> Plan:
    """Plan the job that a document describes, with its layout.

    Args:
        document: Model and layout.
        options: Batch, wrapper and GPUs.
        memo: Cache of chunk measurements from earlier plans of the same model; updated.

    Raises:
        PlanError: The token dispatcher cannot be planned, or the installed torch is too old.
        BridgeError: The job is not possible, see ``BuildJob.check``, or its batch does not divide over the ranks.
    """
    start = time.perf_counter()
    memo = {} if memo is None else memo
    job = BuildJob(document=document.data, wrapper=options.wrapper, distributed_optimizer=options.distributed_optimizer)
    config = ModelConfig.from_dict(job.document)
    layout = job.check(config, options.world_size)
    batch, transformer = options.batch, make_builder(config).transformer_config
    _check_supported(transformer)
    batch.check_sequence(transformer)
    group_size = transformer.microbatch_group_size_per_vp_stage
    microbatches = batch.count_microbatches(layout, group_size=group_size)
    passed: PassedShapes = {}
    # One rank per stage is enough. Stages are measured in order, because each needs the shapes that the one before
    # passes on.
    ranks = [
        measure_rank(job, layout, batch, rank=rank_of(layout, pp=pp), memo=memo, passed=passed)
        for pp in range(layout.pp)
    ]
    return Plan(
        world_size=layout.world_size,
        layout={axis: size for axis, size in asdict(layout).items() if size is not None},
        wrap=str(options.wrapper),
        distributed_optimizer=options.distributed_optimizer,
        layers=ranks[0].layers,
        seq_length=batch.seq_length,
        micro_batch_size=batch.micro_batch_size,
        global_batch_size=batch.global_batch_size,
        microbatches=microbatches,
        microbatch_group_size=group_size,
        parameters=_count_parameters(ranks, layout, get_vocab_size(config)),
        buffers=sum(rank.buffers for rank in ranks),
        gpu_memory=options.gpu_memory,
        stages=[
            _make_stage(pp, rank, layout, microbatches=microbatches, group_size=group_size)
            for pp, rank in enumerate(ranks)
        ],
        seconds=time.perf_counter() - start,
    )


def _check_supported(transformer: TransformerConfig) -> None:
    if TORCH < TESTED_THROUGHOUT:
        raise PlanError(f"plans need torch 2.11 or later, got {torch.__version__}: upgrade torch")
    if transformer.num_moe_experts and transformer.moe_token_dispatcher_type != "alltoall":
        raise PlanError(
            f"moe_token_dispatcher_type {transformer.moe_token_dispatcher_type} cannot be planned: "
            "its sizes depend on tokens; set it to alltoall"
        )


def _count_parameters(ranks: Sequence[Rank], layout: Layout, vocab: int | None) -> int:
    """Count every parameter of the model once, by its full name, in elements.

    Each expert-parallel rank has different experts under the same names, and equally many.
    """
    elements = {
        placement.full_name: placement.logical_shape(vocab).numel() * (layout.ep if of_expert else 1)
        for rank in ranks
        for placement, of_expert in rank.placements
    }
    return sum(elements.values())


def _make_stage(pp: int, rank: Rank, layout: Layout, *, microbatches: int, group_size: int | None) -> StagePlan:
    order = list_passes(layout, pp, microbatches, group_size=group_size)
    activations = compute_peak(order, [chunk.work.kept for chunk in rank.chunks])
    return StagePlan(
        pp=pp,
        rank=rank.rank,
        parameters=sum(chunk.parameters for chunk in rank.chunks),
        weight_bytes=rank.weights,
        gradient_bytes=rank.gradients,
        master_bytes=rank.master,
        state_bytes=rank.state,
        optimizer_bytes=rank.master + rank.state,
        activation_bytes=activations,
        unsharded_bytes=rank.unsharded,
        total_bytes=rank.weights + rank.gradients + rank.master + rank.state + activations + rank.unsharded,
        flops=microbatches * sum(chunk.work.flops for chunk in rank.chunks),
        buckets=rank.buckets,
        chunks=[
            ChunkPlan(
                vp_stage=index,
                layers=chunk.layers,
                parameters=chunk.parameters,
                activation_bytes=chunk.work.kept,
                forward_flops=chunk.work.forward_flops,
                flops=chunk.work.flops,
            )
            for index, chunk in enumerate(rank.chunks)
        ],
        traffic=_make_traffic(rank, layout, microbatches),
    )


def _make_traffic(rank: Rank, layout: Layout, microbatches: int) -> list[Traffic]:
    """Return a step's collectives, and the messages to the neighbouring pipeline ranks."""
    calls = rank.traffic.count(microbatches)
    # A chunk sends its output forward, and the gradient of its input, which has the same size as the input, backward.
    messages = (message for chunk in rank.chunks for message in (chunk.work.received, chunk.work.passed_on))
    sent = [message.bytes for message in messages if message]
    if sent:
        key = ("pp", layout.pp, "send")
        calls.number[key] += len(sent) * microbatches
        calls.size[key] += sum(sent) * microbatches
    return [
        Traffic(group=group, ranks=ranks, operation=operation, calls=calls.number[group, ranks, operation], bytes=size)
        for (group, ranks, operation), size in sorted(calls.size.items())
    ]
