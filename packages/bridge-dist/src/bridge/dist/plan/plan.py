"""An exact plan of a job of any size, made on one CPU: the real stages are built and counted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib import import_module
from math import prod

import torch
from megatron.core.transformer import TransformerConfig

from bridge.config import Document, ModelConfig
from bridge.dist.errors import PlanError
from bridge.dist.fusions import choose_fusions
from bridge.dist.job import BuildJob, get_vocab_size, make_builder
from bridge.dist.layout import Layout
from bridge.dist.patch import Replacement, replace_attributes
from bridge.dist.plan.count.collectives import Calls
from bridge.dist.plan.count.microbatch import Memo, PassedShapes, PassWork
from bridge.dist.plan.count.norms import use_fused_norms
from bridge.dist.plan.count.rank import Rank, measure_rank
from bridge.dist.plan.count.schedule import compute_peak, list_passes
from bridge.dist.plan.layers import Layers, check_process, choose_layers
from bridge.dist.plan.request import PlanRequest
from bridge.dist.plan.results import ChunkPlan, PassCost, Plan, StagePlan, Traffic, default_reserve
from bridge.dist.plan.support import check_supported, leave_out_offloading
from bridge.dist.plan.virtual_rank.rank_order import rank_of
from bridge.dist.train.batch import Batch
from bridge.dist.train.flops import count_model_flops
from bridge.dist.wrapper import ShardingStrategy, Wrapper, resolve_sharding_strategy

_MOST_RANKS = 2**20
"""Every rank of a group is listed, which takes seconds and more than 1 GiB for a million."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Inputs of a plan other than the model; ``gpu_memory`` and ``reserve`` are in bytes.

    ``sharding_strategy`` is that of Megatron-FSDP; None for its default. ``reserve`` is kept free on each GPU; None for
    ``default_reserve``. ``transposes_fp8`` is that of the machine, see ``Machine``; without one, weights in FP8 count
    twice, as before Blackwell. ``layers`` must be those for which megatron-core was imported: see
    ``bridge.dist.plan.layers.prepare_process``.

    Raises:
        PlanError: The job is too large.
    """

    batch: Batch
    world_size: int
    wrapper: Wrapper = Wrapper.DDP
    distributed_optimizer: bool = False
    sharding_strategy: ShardingStrategy | None = None
    gpu_memory: int | None = None
    reserve: int | None = None
    transposes_fp8: bool = True
    layers: Layers = Layers.INSTALLED

    def __post_init__(self) -> None:
        if self.world_size > _MOST_RANKS:
            raise PlanError(f"plans are for up to {_MOST_RANKS:,} GPUs, got {self.world_size:,}: choose fewer")


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
    return PlanOptions(
        batch=request.make_batch(layout, seq_length=request.seq_length or get_sequence_length(document)),
        world_size=layout.world_size,
        wrapper=request.wrapper,
        distributed_optimizer=request.distributed_optimizer,
        sharding_strategy=request.sharding_strategy,
        gpu_memory=request.gpu_memory,
        reserve=request.reserve,
        layers=choose_layers(document, request.layers),
    )


def plan(
    document: Document, options: PlanOptions, *, memo: Memo | None = None, stages: Sequence[int] | None = None
) -> Plan:
    """Plan the job that a document describes, with its layout.

    Args:
        document: Model and layout.
        options: Batch, wrapper and GPUs.
        memo: Cache of chunk measurements from earlier plans of the same model; updated.
        stages: The pipeline stages to plan, in order; by default all. The plan then has only these, and only their
            parameters. A stage after one that is not planned must get the hidden states of a sequence.

    Raises:
        PlanError: The model has something that a plan cannot count, the installed torch is too old, or megatron-core
            was imported for other layers.
        BridgeError: The job is not possible, see ``BuildJob.check``, or its batch does not divide over the ranks.
    """
    start = time.perf_counter()
    check_process(options.layers)
    memo = {} if memo is None else memo
    document = deepcopy(document)
    fusions, left_out = [], []
    if options.layers is Layers.TRANSFORMER_ENGINE:
        fusions, left_out = choose_fusions(document), leave_out_offloading(document)
    job = BuildJob(
        document=document.data,
        wrapper=options.wrapper,
        distributed_optimizer=options.distributed_optimizer,
        sharding_strategy=options.sharding_strategy,
    )
    config = ModelConfig.from_dict(job.document)
    layout = job.check(config, options.world_size)
    batch, transformer = options.batch, make_builder(config).transformer_config
    check_supported(transformer, options.layers)
    group_size = transformer.microbatch_group_size_per_vp_stage
    microbatches = batch.check(transformer, layout)
    passed: PassedShapes = {}
    # One rank per stage is enough. Stages are measured in order, because each needs the shapes that the one before
    # passes on.
    planned = range(layout.pp) if stages is None else stages
    with _use_kernels(options):
        ranks = [
            measure_rank(job, layout, batch, rank=rank_of(layout, pp=pp), memo=memo, passed=passed) for pp in planned
        ]
    shapes = _list_shapes(ranks, layout, get_vocab_size(config))
    return Plan(
        world_size=layout.world_size,
        layout={axis: size for axis, size in asdict(layout).items() if size is not None},
        wrap=str(options.wrapper),
        distributed_optimizer=options.distributed_optimizer,
        sharding_strategy=resolve_sharding_strategy(options.wrapper, options.sharding_strategy),
        layers=ranks[0].layers,
        fusions=fusions,
        left_out=left_out,
        seq_length=batch.seq_length,
        micro_batch_size=batch.micro_batch_size,
        global_batch_size=batch.global_batch_size,
        microbatches=microbatches,
        microbatch_group_size=group_size,
        parameters=sum(map(prod, shapes.values())),
        buffers=sum(rank.buffers for rank in ranks),
        gpu_memory=options.gpu_memory,
        reserve_bytes=default_reserve(layout.world_size) if options.reserve is None else options.reserve,
        model_flops=count_model_flops(shapes, transformer, batch),
        has_experts=bool(transformer.num_moe_experts),
        overlapped=_list_overlapped(transformer),
        has_cuda_graphs=transformer.cuda_graph_impl != "none",
        stages=[
            _make_stage(pp, rank, layout, microbatches=microbatches, group_size=group_size)
            for pp, rank in zip(planned, ranks, strict=True)
        ],
        seconds=time.perf_counter() - start,
    )


def _use_kernels(options: PlanOptions) -> AbstractContextManager[None]:
    """Return a context in which layers keep what they keep with the kernels of a GPU."""
    if options.layers is Layers.PYTORCH:
        return use_fused_norms()
    if options.layers is Layers.TRANSFORMER_ENGINE and not options.transposes_fp8:
        storage = import_module("transformer_engine.pytorch.fp8").WeightStorage  # of the stand-in
        return replace_attributes(Replacement(storage, "needs_transposed", False))
    return nullcontext()


def _list_shapes(ranks: Sequence[Rank], layout: Layout, vocab: int | None) -> dict[str, torch.Size]:
    """Return the shape of every parameter of the model, once, by its full name.

    Each expert-parallel rank has different experts under the same names, and equally many; the names get its number.
    """
    return {
        f"{index}:{placement.full_name}" if of_expert else placement.full_name: placement.logical_shape(vocab)
        for rank in ranks
        for placement, of_expert in rank.placements
        for index in range(layout.ep if of_expert else 1)
    }


def _list_overlapped(transformer: TransformerConfig) -> list[str]:
    """Return the groups whose communication within layers Megatron overlaps with computation."""
    overlapped = {"tp": transformer.tp_comm_overlap, "ep": transformer.overlap_moe_expert_parallel_comm}
    return [group for group, is_overlapped in overlapped.items() if is_overlapped]


def _make_stage(pp: int, rank: Rank, layout: Layout, *, microbatches: int, group_size: int | None) -> StagePlan:
    order = list_passes(layout, pp, microbatches, group_size=group_size)
    works = [chunk.work for chunk in rank.chunks]
    peak = compute_peak(order, [work.kept for work in works], [work.temporary for work in works])
    activations = peak + sum(work.shared for work in works)
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
                temporary_bytes=chunk.work.temporary,
                forward_flops=chunk.work.forward_flops,
                flops=chunk.work.flops,
                weight_gradient_flops=chunk.work.weight_gradient_flops,
                forward=_make_pass_cost(chunk.work.forward),
                backward=_make_pass_cost(chunk.work.backward),
                received_bytes=chunk.work.received.bytes if chunk.work.received else 0,
                sent_bytes=chunk.work.passed_on.bytes if chunk.work.passed_on else 0,
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
    return _list_traffic(calls)


def _make_pass_cost(work: PassWork) -> PassCost:
    return PassCost(work.operations, _list_traffic(work.calls))


def _list_traffic(calls: Calls) -> list[Traffic]:
    return [
        Traffic(group=group, ranks=ranks, operation=operation, calls=calls.number[group, ranks, operation], bytes=size)
        for (group, ranks, operation), size in sorted(calls.size.items())
    ]
