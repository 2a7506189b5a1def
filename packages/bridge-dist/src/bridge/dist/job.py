"""What `bridge build` does on each rank: join the world, build, train, report."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch.distributed.elastic.multiprocessing.errors import record

from bridge.config import ModelConfig
from bridge.dist.agreement import facts, versions
from bridge.dist.build import DistributedModelBuilder
from bridge.dist.environment import leave_out_cuda_graphs, prepare_process
from bridge.dist.errors import BuilderContractError, LayoutError, TrainingError
from bridge.dist.layout import Layout, create_process_groups, destroy_process_groups
from bridge.dist.options import BuildOptions, Wrapper
from bridge.dist.preflight import Setup, check
from bridge.dist.report import BuildReport, ChunkReport, RankReport, with_progress
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
from bridge.dist.world import world

_SEED = 1234


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """One build, as plain data that every rank gets."""

    document: dict[str, Any]
    wrapper: Wrapper
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
        check(Setup(transformer=transformer, layout=layout, options=options, model=config), builder.rules)
        if self.training is not None:
            check_training(self.wrapper, config, transformer)
            self.training.check_sequence(transformer)
            self.training.microbatches(layout)
            read_text(self.training, config)
        return layout

    def options(self, config: TransformerConfig) -> BuildOptions:
        """Return the options of the build: the wrapper's usual ones."""
        if self.wrapper is Wrapper.NONE:
            return BuildOptions(wrap_with_ddp=False)
        fsdp = self.wrapper is Wrapper.MEGATRON_FSDP
        return BuildOptions(
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=config.bf16 or config.fp16,
                check_for_nan_in_grad=not config.fp16,  # there an overflow is the loss scaler's to find
                use_distributed_optimizer=fsdp or self.distributed_optimizer,
                use_megatron_fsdp=fsdp,
                data_parallel_sharding_strategy="optim_grads_params" if fsdp else "no_shard",
                # gloo has no fused division.
                gradient_reduce_div_fusion=torch.cuda.is_available(),
            ),
            use_megatron_fsdp=fsdp,
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


def check_devices(ranks: int) -> None:
    """Check that local ranks have a GPU each, on a machine that has any.

    Raises:
        LayoutError: There are more ranks than GPUs.
    """
    if torch.cuda.is_available() and ranks > torch.cuda.device_count():
        raise LayoutError(
            f"{ranks} ranks do not fit {torch.cuda.device_count()} GPU(s), one each: "
            "start fewer, or set CUDA_VISIBLE_DEVICES='' to run on the CPU"
        )


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


@record
def run_rank(job: BuildJob) -> BuildReport:
    """Run a job as one rank of the world that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Collective: every rank gets the same job and returns the same report. Rank 0 shows progress on standard error,
    where also goes what Megatron prints.
    """
    with joined(job) as (config, layout, groups):
        return _report(job, build_and_train(job, config, layout, groups), layout, groups, vocab_size(config))


@contextlib.contextmanager
def joined(job: BuildJob) -> Iterator[tuple[ModelConfig, Layout, ProcessGroupCollection]]:
    """Join the world that the environment describes with a job's configuration and process groups.

    They are left after a success only, see ``world``.
    """
    with contextlib.redirect_stdout(sys.stderr), world(facts(job=job, versions=versions())):
        config = ModelConfig.from_dict(job.document)
        layout = job.check(config, torch.distributed.get_world_size())
        groups = create_process_groups(layout)
        yield config, layout, groups
        destroy_process_groups()


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a job made on this rank: wrapped stages, where each one's parameters stand in the whole model, steps."""

    stages: list[MegatronModule]
    placements: list[list[Placement]]
    steps: list[Step]


def build_and_train(job: BuildJob, config: ModelConfig, layout: Layout, groups: ProcessGroupCollection) -> Run:
    """Build the stages of this rank, wrap them, and train them if the job says so.

    Collective. ``config`` is this process's own: it gets hooks, and its dropout rates are set to zero for training.
    """
    builder = job.builder(config)
    prepare_process(builder.transformer_config)
    model_parallel_cuda_manual_seed(_SEED, te_rng_tracker=builder.transformer_config.use_te_rng_tracker)
    leader = torch.distributed.get_rank() == 0
    placements: list[list[Placement]] = []

    def draw(stages: list[MegatronModule]) -> list[MegatronModule]:
        draw_weights(stages, groups, vocab_size=vocab_size(config))
        return stages

    def note(stages: list[MegatronModule]) -> list[MegatronModule]:
        # FSDP shards parameters when it wraps; they are whole only now.
        placements.extend([named.placement for named in named_parameters(stage, groups)] for stage in stages)
        return stages

    # The drawn weights come first, so that a hook may still change them.
    if job.training is not None:
        if (dropout := switch_off_dropout(builder.transformer_config)) and leader:
            _say(f"{' and '.join(dropout)} set to 0: with dropout, losses would depend on the layout")
        if job.modelopt_checkpoint is None:
            config.pre_wrap_hooks.insert(0, draw)
    config.pre_wrap_hooks.append(note)
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
        if leader:
            taken = with_progress(taken, job.training.steps, describe=lambda step: f"loss {step.loss:.4f}")
        steps = list(taken)
    return Run(stages=stages, placements=placements, steps=steps)


def vocab_size(config: ModelConfig) -> int | None:
    """Return the number of tokens that a configuration declares, not padded; None if it has none."""
    size: int | None = getattr(config, "vocab_size", None)
    return size


def _report(job: BuildJob, run: Run, layout: Layout, groups: ProcessGroupCollection, vocab: int | None) -> BuildReport:
    """Collective: collect what every rank built."""
    chunks = [_chunk_report(index, stage, run.placements[index]) for index, stage in enumerate(run.stages)]
    placements = [placement for stage in run.placements for placement in stage]
    ranks, whole = _gather(_rank_report(groups, chunks), placements)
    return BuildReport(
        world_size=layout.world_size,
        layout=asdict(layout),
        wrap=str(job.wrapper),
        parameters=sum(placement.logical_shape(vocab).numel() for placement in whole),
        padded_parameters=sum(placement.full_shape.numel() for placement in whole),
        ranks=ranks,
        losses=[step.loss for step in run.steps],
        grad_norms=[step.grad_norm for step in run.steps],
        tokens_per_second=_tokens_per_second(job.training, run.steps),
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


def _rank_report(groups: ProcessGroupCollection, chunks: list[ChunkReport]) -> RankReport:
    return RankReport(
        rank=torch.distributed.get_rank(),
        tp=groups.tp.rank(),
        pp=groups.pp.rank(),
        dp=groups.dp.rank(),
        cp=groups.cp.rank(),
        ep=groups.ep.rank(),
        chunks=chunks,
    )


def _gather(rank: RankReport, placements: list[Placement]) -> tuple[list[RankReport], list[Placement]]:
    """Collect the ranks' reports, and every parameter of the whole model once."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (rank, placements))
    whole = {placement.full_name: placement for _, part in everyone for placement in part}
    return [report for report, _ in everyone], list(whole.values())


def _say(message: str) -> None:
    print(message, file=sys.stderr)  # noqa: T201


def _tokens_per_second(training: TrainOptions | None, steps: list[Step]) -> float | None:
    """Mean over the steps but the first, which warms up; None without steps."""
    timed = steps[1:] or steps
    if training is None or not timed:
        return None
    tokens = training.global_batch_size * training.seq_length * len(timed)
    return tokens / sum(step.seconds for step in timed)
