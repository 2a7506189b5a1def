"""What `bridge build` does on each rank: join the world, build, train, report."""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy
import torch
import torch.distributed
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule, TransformerConfig

from bridge.builders import Hook, compose_hooks
from bridge.config import ModelConfig
from bridge.dist.agreement import facts, versions
from bridge.dist.build import DistributedModelBuilder
from bridge.dist.checks.preflight import Setup, check
from bridge.dist.checks.rules import RULES
from bridge.dist.engine.groups import create_process_groups, destroy_process_groups
from bridge.dist.environment import inspect_process, leave_out_cuda_graphs, prepare_process
from bridge.dist.errors import BuilderContractError, TrainingError
from bridge.dist.flops import model_flops, peak_flops
from bridge.dist.layout import Layout, embedding_ranks
from bridge.dist.memory import PeakMemory, peak_memory, reset_peak_memory
from bridge.dist.options import BuildOptions
from bridge.dist.report import BuildReport, ChunkReport, RankReport, with_progress
from bridge.dist.run.world import world
from bridge.dist.stages import layers_of
from bridge.dist.text import Text
from bridge.dist.train import (
    Step,
    TrainOptions,
    left_to_others,
    mask_vocabulary_padding,
    switch_off_dropout,
    train,
)
from bridge.dist.weights import Placement, draw_weights, layer_indices, named_parameters
from bridge.dist.wrapper import Wrapper, usual_ddp_options

_SEED = 1234
_SEEDS_OF_A_STAGE = 100


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """One build, as plain data that every rank gets.

    ``overrides`` are those that ``document`` holds already; they are reported.
    """

    document: dict[str, Any]
    wrapper: Wrapper
    overrides: tuple[str, ...] = ()
    distributed_optimizer: bool = False
    dp: int | None = None
    training: TrainOptions | None = None
    modelopt_checkpoint: Path | None = None

    def builder(self, config: ModelConfig) -> DistributedModelBuilder[MegatronModule, ModelConfig]:
        """Make the builder that a configuration names.

        Raises:
            BuilderContractError: This engine cannot drive it.
        """
        return make_builder(config, modelopt_checkpoint=self.modelopt_checkpoint)

    def check(self, config: ModelConfig, world_size: int) -> Layout:
        """Check everything that can be checked before the ranks meet, and return the layout.

        Raises:
            BuilderContractError: This engine cannot drive the builder that the configuration names.
            LayoutError: The layout does not fit ``world_size`` ranks.
            PreflightError: A known conflict of configuration, layout and wrapper.
            TrainingError: The batch sizes do not fit the layout, or the text the model.
            BridgeError: Whatever the configuration's own ``finalize`` raises.
        """
        finalize = getattr(config, "finalize", None)
        if finalize is not None:
            finalize()
        builder = self.builder(config)
        transformer = builder.transformer_config
        leave_out_cuda_graphs(transformer)
        layout = Layout.of(transformer, world_size, dp=self.dp)
        options = self.options(transformer)
        setup = Setup(
            transformer=transformer, layout=layout, options=options, model=config, environment=inspect_process()
        )
        check(setup, (*RULES, *builder.rules))
        if self.training is not None:
            check_training(self.wrapper, config, transformer)
            self.training.check_sequence(transformer)
            self.training.microbatches(layout, group_size=transformer.microbatch_group_size_per_vp_stage)
            read_text(self.training, config)
        return layout

    def embedding_ranks(self, config: ModelConfig) -> list[int] | None:
        """Return the pipeline ranks that hold the word embedding or a copy; None for the first and the last."""
        tied = getattr(config, "share_embeddings_and_output_weights", False)
        return embedding_ranks(self.builder(config).transformer_config, tied=tied)

    def options(self, config: TransformerConfig) -> BuildOptions:
        """Return the options of the build: the wrapper's usual ones."""
        if self.wrapper is Wrapper.NONE:
            return BuildOptions(wrap_with_ddp=False)
        ddp = usual_ddp_options(
            self.wrapper,
            bf16=config.bf16,
            fp16=config.fp16,
            distributed_optimizer=self.distributed_optimizer,
            on_gpu=torch.cuda.is_available(),
        )
        return BuildOptions(
            ddp_config=DistributedDataParallelConfig(**ddp),
            use_megatron_fsdp=self.wrapper is Wrapper.MEGATRON_FSDP,
            use_torch_fsdp2=self.wrapper is Wrapper.TORCH_FSDP2,
        )


def check_training(wrapper: Wrapper, config: ModelConfig, transformer: TransformerConfig) -> None:
    """Refuse what the training run cannot do, or would compute differently under another layout.

    Raises:
        TrainingError: Says what to change.
    """
    refused = {
        "--wrap none: training needs a data-parallel wrapper, which reduces the gradients": wrapper is Wrapper.NONE,
        "calculate_per_token_loss: set it to false, the loss is the mean over all tokens": (
            transformer.calculate_per_token_loss
        ),
        "parallel_output = false: set it to true, the loss is computed from split logits": (
            not getattr(config, "parallel_output", True)
        ),
        "init_model_with_meta_device: set it to false, weights are drawn before they are wrapped": (
            transformer.init_model_with_meta_device
        ),
    }
    refused |= {f"{field}: {advice}": True for field, advice in left_to_others(transformer)}
    if broken := [reason for reason, applies in refused.items() if applies]:
        raise TrainingError("\n".join(f"cannot train with {reason}" for reason in broken))


def make_builder(
    config: ModelConfig, *, modelopt_checkpoint: Path | None = None
) -> DistributedModelBuilder[MegatronModule, ModelConfig]:
    """Make the builder that a configuration names.

    Args:
        config: What it builds.
        modelopt_checkpoint: What it restores a ModelOpt state and weights from, if anything.

    Raises:
        BuilderContractError: This engine cannot drive it, or it restores nothing.
    """
    builder_cls = config.get_builder_cls()
    given = {} if modelopt_checkpoint is None else {"modelopt_checkpoint": modelopt_checkpoint}
    if not given.keys() <= inspect.signature(builder_cls).parameters.keys():
        raise BuilderContractError(f"{builder_cls.__name__} restores no ModelOpt state: give no checkpoint to load")
    builder = builder_cls(config, **given)
    if not isinstance(builder, DistributedModelBuilder):
        raise BuilderContractError(
            f"{type(builder).__name__} is no DistributedModelBuilder: derive it from that class of bridge.dist"
        )
    return builder


def read_text(options: TrainOptions, config: ModelConfig) -> Text:
    """Read the text to train on as tokens of the model.

    Raises:
        TrainingError: It cannot be read, or the configuration has no vocabulary, or one that is too small.
    """
    vocab = vocab_size(config)
    if vocab is None:
        raise TrainingError(f"training on a text needs a vocab_size, {type(config).__name__} has none: set it")
    longest: int | None = getattr(config, "seq_length", None)
    if longest is not None and options.seq_length > longest:
        raise TrainingError(f"samples of {options.seq_length} tokens are longer than the model's seq_length, {longest}")
    return Text.read(options.text, vocab_size=vocab)


def run_rank(job: BuildJob) -> BuildReport:
    """Run a job as one rank of the world that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Collective: every rank gets the same job and returns the same report. Rank 0 shows progress on standard error,
    where also goes what Megatron prints.
    """
    with joined(job) as (config, layout, groups):
        run = build_and_train(job, config, layout, groups, shows_steps=True)
        return _report(job, config, run, layout, groups)


@contextlib.contextmanager
def joined(job: BuildJob) -> Iterator[tuple[ModelConfig, Layout, ProcessGroupCollection]]:
    """Join the world that the environment describes with a job's configuration and process groups.

    They are left after a success only, see ``world``.
    """
    with contextlib.redirect_stdout(sys.stderr), world(facts(job=job, versions=versions())):
        config = ModelConfig.from_dict(job.document)
        layout = job.check(config, torch.distributed.get_world_size())
        groups = create_process_groups(layout, embedding_ranks=job.embedding_ranks(config))
        yield config, layout, groups
        destroy_process_groups()


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a job made on this rank: wrapped stages, where each one's parameters stand in the whole model, steps."""

    stages: list[MegatronModule]
    placements: list[list[Placement]]
    steps: list[Step]


def build_and_train(
    job: BuildJob,
    config: ModelConfig,
    layout: Layout,
    groups: ProcessGroupCollection,
    *,
    shows_steps: bool = False,
) -> Run:
    """Build the stages of this rank, wrap them, and train them if the job says so.

    Collective. ``config`` is this process's own: it gets hooks, and its dropout rates are set to zero for training.
    With ``shows_steps`` rank 0 shows the loss of each step on standard error.
    """
    reset_peak_memory()
    builder = job.builder(config)
    prepare_process(builder.transformer_config)
    seed_random_states(builder.transformer_config, groups)
    leader = torch.distributed.get_rank() == 0
    placements: list[list[Placement]] = []

    def draw(stages: list[MegatronModule]) -> list[MegatronModule]:
        draw_weights(stages, groups, vocab_size=vocab_size(config))
        return stages

    def note(stages: list[MegatronModule]) -> list[MegatronModule]:
        # FSDP shards parameters when it wraps; they are whole only now.
        placements.extend([named.placement for named in named_parameters(stage, groups)] for stage in stages)
        return stages

    # The model's own hooks count as one list, whose last hook may return None. The drawn weights come before them, so
    # that a hook may still change them.
    hooks: list[Hook] = [compose_hooks(config.pre_wrap_hooks), note]
    if job.training is not None:
        if (dropout := switch_off_dropout(builder.transformer_config)) and leader:
            _say(f"{' and '.join(dropout)} set to 0: with dropout, losses would depend on the layout")
        if job.modelopt_checkpoint is None:
            hooks.insert(0, draw)
    config.pre_wrap_hooks = hooks
    options = job.options(builder.transformer_config)
    stages = builder.build_distributed_models(
        groups,
        ddp_config=options.ddp_config,
        use_megatron_fsdp=options.use_megatron_fsdp,
        use_torch_fsdp2=options.use_torch_fsdp2,
        wrap_with_ddp=options.wrap_with_ddp,
    )
    steps: list[Step] = []
    if job.training is not None:
        text = read_text(job.training, config)
        mask_vocabulary_padding(stages, vocab_size=text.vocab_size)
        taken = train(stages, groups, layout, text=text, options=job.training, forward_step=builder.forward_step)
        if leader and shows_steps:
            taken = with_progress(taken, job.training.steps, describe=lambda _, step: f"loss {step.loss:.4f}")
        steps = list(taken)
    return Run(stages=stages, placements=placements, steps=steps)


def seed_random_states(config: TransformerConfig, groups: ProcessGroupCollection, *, seed: int = _SEED) -> None:
    """Seed Python, numpy, torch and Megatron's random states as Megatron-LM does: each pipeline stage its own way.

    Source: ``_set_random_seed`` of megatron.training 0.19.2.
    """
    seed += _SEEDS_OF_A_STAGE * groups.pp.rank()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed,
        te_rng_tracker=config.use_te_rng_tracker,
        inference_rng_tracker=config.inference_rng_tracker,
        use_cudagraphable_rng=config.cuda_graph_impl != "none",
    )


def vocab_size(config: ModelConfig) -> int | None:
    """Return the number of tokens that a configuration declares, not padded; None if it has none."""
    size: int | None = getattr(config, "vocab_size", None)
    return size


def _report(
    job: BuildJob, config: ModelConfig, run: Run, layout: Layout, groups: ProcessGroupCollection
) -> BuildReport:
    """Collective: collect what every rank built, held at most, and took for a step."""
    memory = peak_memory()
    chunks = [_chunk_report(index, stage, run.placements[index]) for index, stage in enumerate(run.stages)]
    placements = [placement for stage in run.placements for placement in stage]
    everyone = _gather(_Outcome(_rank_report(groups, chunks, memory), placements, _mean_seconds(run.steps)))
    whole = {placement.full_name: placement for outcome in everyone for placement in outcome.placements}
    shapes = {name: placement.logical_shape(vocab_size(config)) for name, placement in whole.items()}
    transformer, training = job.builder(config).transformer_config, job.training
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    in_half_precision = transformer.bf16 or transformer.fp16
    return BuildReport(
        world_size=layout.world_size,
        layout=asdict(layout),
        wrap=str(job.wrapper),
        distributed_optimizer=job.distributed_optimizer,
        layers=layers_of(run.stages),
        device="cpu" if device is None else "cuda",
        device_name=device,
        device_peak_flops=peak_flops(device) if device is not None and in_half_precision else None,
        **{size: getattr(training, size, None) for size in ("seq_length", "micro_batch_size", "global_batch_size")},
        parameters=sum(shape.numel() for shape in shapes.values()),
        padded_parameters=sum(placement.full_shape.numel() for placement in whole.values()),
        ranks=[outcome.report for outcome in everyone],
        losses=[step.loss for step in run.steps],
        grad_norms=[step.grad_norm for step in run.steps],
        step_seconds=max((outcome.step_seconds for outcome in everyone if outcome.step_seconds), default=None),
        model_flops=None if training is None else model_flops(shapes, transformer, training),
        document=job.document,
        overrides=list(job.overrides),
        versions=versions(),
    )


def _chunk_report(index: int, stage: MegatronModule, placements: list[Placement]) -> ChunkReport:
    return ChunkReport(
        vp_stage=index,
        layers=layer_indices(stage),
        parameters=sum(placement.shape.numel() for placement in placements),
        wrappers=list(wrapper_names(stage)),
    )


def wrapper_names(module: torch.nn.Module) -> Iterator[str]:
    """Name the wrappers of a stage and the model they hold, outermost first."""
    yield type(module).__name__
    inner = getattr(module, "module", None)
    if isinstance(inner, torch.nn.Module):
        yield from wrapper_names(inner)


def _rank_report(groups: ProcessGroupCollection, chunks: list[ChunkReport], memory: PeakMemory) -> RankReport:
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
    """What the others need to know of a rank: its report, where its parameters stand, the mean time of its steps."""

    report: RankReport
    placements: list[Placement]
    step_seconds: float | None


def _gather(mine: _Outcome) -> list[_Outcome]:
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _say(message: str) -> None:
    print(message, file=sys.stderr)  # noqa: T201


def _mean_seconds(steps: Sequence[Step]) -> float | None:
    """Mean time of the steps but the first, which warms up; None if there is no other."""
    return mean(step.seconds for step in steps[1:]) if len(steps) > 1 else None
