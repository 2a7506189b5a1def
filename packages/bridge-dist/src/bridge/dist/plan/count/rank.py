"""Measuring a rank: build, wrap and run its real stages on the meta device, and count memory, FLOPs and traffic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule

from bridge.builders import compose_hooks
from bridge.config import ModelConfig
from bridge.dist.cpu import on_meta
from bridge.dist.engine.environment import disable_cuda_graphs
from bridge.dist.engine.placement import Placement, list_layer_indices, named_parameters
from bridge.dist.engine.stages import identify_layers
from bridge.dist.job import BuildJob, make_builder
from bridge.dist.layout import Layout
from bridge.dist.plan.count.collectives import StepCalls
from bridge.dist.plan.count.memory import (
    count_optimizer_bytes,
    count_parameters,
    count_saved_buffer_elements,
    count_storage_bytes,
    gradient_buckets,
    held_tensors,
)
from bridge.dist.plan.count.microbatch import Memo, PassedShapes, RankStages, Work
from bridge.dist.plan.count.step import run_replicated, run_sharded
from bridge.dist.plan.virtual_rank.groups import act_as_rank
from bridge.dist.plan.virtual_rank.latent_rotation import rotate_latents_on_meta
from bridge.dist.plan.virtual_rank.peers import answer_for_all_ranks
from bridge.dist.plan.virtual_rank.recomputation import recompute_on_meta
from bridge.dist.plan.virtual_rank.routing import assume_equal_shares
from bridge.dist.plan.virtual_rank.sharding import allow_sharding_on_meta
from bridge.dist.train.batch import Batch
from bridge.dist.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A chunk of a rank: its layers, its number of parameters, and the cost of a microbatch."""

    layers: list[int]
    parameters: int
    work: Work


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Measurements of a rank: bytes of each kind of memory, chunks, parameter placements and traffic."""

    rank: int
    weights: int
    gradients: int
    master: int
    state: int
    buckets: list[int]
    chunks: list[Chunk]
    placements: list[tuple[Placement, bool]]
    """The placement of each parameter, and whether it belongs to an expert of this expert-parallel rank."""
    buffers: int
    """Elements of the buffers that checkpoints contain."""
    unsharded: int
    """Peak bytes of unsharded weights, gradients and communication buffers under a wrapper that shards weights."""
    traffic: StepCalls
    layers: str
    """The library of the layers."""


@contextlib.contextmanager
def _replace_kernels() -> Iterator[None]:
    """Replace what needs values, other ranks or a GPU."""
    with assume_equal_shares(), answer_for_all_ranks(), recompute_on_meta(), rotate_latents_on_meta():
        yield


def measure_rank(
    job: BuildJob, layout: Layout, batch: Batch, *, rank: int, memo: Memo, passed: PassedShapes | None = None
) -> Rank:
    """Build, wrap and run the stages of a rank.

    Args:
        job: The model and its wrapper.
        layout: The sizes of the job.
        batch: The batch of a step.
        rank: The rank to measure. Ranks that share ``passed`` must be measured in the order of their pipeline stages.
        memo: Cache of the cost of chunks, read and extended.
        passed: Shapes that stages pass on, read and extended. A stage that is not in it passes on the hidden states
            of the sequence. So does the last rank of a pipeline to the first, because only the last virtual stage may
            predict several tokens (megatron-core 0.19.2).

    Raises:
        TrainingError: The batch cannot be divided among the ranks.
    """
    passed = {} if passed is None else passed
    is_fsdp = job.wrapper in (Wrapper.MEGATRON_FSDP, Wrapper.TORCH_FSDP2)
    sharding = allow_sharding_on_meta() if is_fsdp else contextlib.nullcontext()
    embedding_ranks = job.find_embedding_ranks(ModelConfig.from_dict(job.document))
    as_this_rank = act_as_rank(layout, rank, embedding_ranks=embedding_ranks)
    with on_meta(), as_this_rank as groups, sharding, _replace_kernels():
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        config = ModelConfig.from_dict(job.document)
        builder = make_builder(config)
        disable_cuda_graphs(builder.transformer_config)
        builder.transformer_config.perform_initialization = False  # meta tensors have no values
        placements: list[tuple[Placement, bool]] = []

        def record_placements(stages: list[MegatronModule]) -> list[MegatronModule]:
            placements.extend(
                # Megatron sets `allreduce` to False on the parameters of experts.
                (named.placement, not getattr(named.parameter, "allreduce", True))
                for stage in stages
                for named in named_parameters(stage, groups)
            )
            return stages

        # Composed, because the last hook of the model may return None.
        config.pre_wrap_hooks = [compose_hooks(config.pre_wrap_hooks), record_placements]
        options = job.make_options(builder.transformer_config)
        ddp_config = options.ddp_config
        if ddp_config is not None:  # meta tensors have no values to check
            ddp_config = replace(ddp_config, check_for_nan_in_grad=False)
        stages = builder.build_distributed_models(
            groups,
            ddp_config=ddp_config,
            use_megatron_fsdp=options.use_megatron_fsdp,
            use_torch_fsdp2=options.use_torch_fsdp2,
            wrap_with_ddp=options.wrap_with_ddp,
        )
        rank_stages = RankStages(stages, builder, groups, layout, batch)
        parameters = list(map(count_parameters, stages))
        master, state = count_optimizer_bytes(stages) if options.wrap_with_ddp else (0, 0)
        step = run_sharded(rank_stages, passed) if is_fsdp else run_replicated(rank_stages, memo, passed)
        return Rank(
            rank=rank,
            weights=count_storage_bytes(held_tensors(stages)) + sum(work.workspaces for work in step.works),
            gradients=step.gradients,
            master=master,
            state=state,
            buckets=[bucket.grad_data.numel() for stage in stages for bucket in gradient_buckets(stage)],
            chunks=[
                Chunk(layers=list_layer_indices(stage), parameters=count, work=work)
                for stage, count, work in zip(stages, parameters, step.works, strict=True)
            ],
            placements=placements,
            buffers=sum(count_saved_buffer_elements(stage) for stage in stages),
            unsharded=step.unsharded,
            traffic=step.traffic,
            layers=identify_layers(stages),
        )
