"""Build and training of a job on this rank."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig

from bridge.builders import Hook, compose_hooks
from bridge.config import ModelConfig
from bridge.dist.checkpoint.load import load_checkpoint
from bridge.dist.checkpoint.progress import Progress
from bridge.dist.checkpoint.save import check_target, save_checkpoint
from bridge.dist.checkpoint.tokenizer import find_tokenizer_folder
from bridge.dist.engine.environment import prepare_process
from bridge.dist.engine.forward import ForwardStep
from bridge.dist.engine.placement import Placement, named_parameters
from bridge.dist.engine.seeds import seed_random_states
from bridge.dist.engine.weights import draw_weights
from bridge.dist.job import BuildJob, get_vocab_size, read_text
from bridge.dist.layout import Layout
from bridge.dist.loaders import find_loader
from bridge.dist.run.peak_memory import reset_peak_memory
from bridge.dist.run.progress import show_progress
from bridge.dist.train.invariance import mask_vocabulary_padding, switch_off_dropout
from bridge.dist.train.step import Step, TrainOptions, train


@dataclass(frozen=True, kw_only=True)
class BuiltRank:
    """A job on this rank: wrapped stages, the placements of their parameters in the whole model, and training steps.

    ``iteration`` counts the steps behind the model, those of a loaded checkpoint included.
    """

    stages: list[MegatronModule]
    placements: list[list[Placement]]
    steps: list[Step]
    iteration: int


def build_and_train(
    job: BuildJob,
    config: ModelConfig,
    layout: Layout,
    groups: ProcessGroupCollection,
    *,
    show_steps: bool = False,
    before_training: Callable[[list[MegatronModule]], None] | None = None,
) -> BuiltRank:
    """Build and wrap the stages of this rank, and train them if the job asks for it.

    Collective. Modifies ``config``: adds hooks, does not initialise weights that are loaded and, for training, sets
    dropout to zero. With ``show_steps`` rank 0 prints the loss of each step to standard error.
    ``before_training`` is called with the wrapped stages.
    """
    reset_peak_memory()  # an earlier job of this process may have used more
    builder = job.make_builder(config)
    _prepare(job, builder.transformer_config, groups)
    placements = _set_hooks(job, config, groups)
    options = job.make_options(builder.transformer_config)
    stages = builder.build_distributed_models(
        groups,
        ddp_config=options.ddp_config,
        use_megatron_fsdp=options.use_megatron_fsdp,
        use_torch_fsdp2=options.use_torch_fsdp2,
        wrap_with_ddp=options.wrap_with_ddp,
    )
    if before_training is not None:
        before_training(stages)
    steps: list[Step] = []
    if job.training is None:
        progress = _resume(job, stages, groups, None)
        _save(job, stages, groups, None, progress)
        iteration = progress.step
    else:
        steps, iteration = _train(
            job,
            config,
            stages,
            layout,
            groups,
            training=job.training,
            forward_step=builder.forward_step,
            show_steps=show_steps,
        )
    return BuiltRank(stages=stages, placements=placements, steps=steps, iteration=iteration)


def _prepare(job: BuildJob, transformer: TransformerConfig, groups: ProcessGroupCollection) -> None:
    """Prepare this process and the configuration for the build."""
    prepare_process(transformer)
    seed_random_states(transformer, groups)
    if job.training is not None and (dropout := switch_off_dropout(transformer)) and _is_leader():
        _print_stderr(f"{' and '.join(dropout)} set to 0: with dropout the losses would depend on the layout")
    if job.weights is not None:
        transformer.perform_initialization = False


def _train(
    job: BuildJob,
    config: ModelConfig,
    stages: list[MegatronModule],
    layout: Layout,
    groups: ProcessGroupCollection,
    *,
    training: TrainOptions,
    forward_step: ForwardStep,
    show_steps: bool,
) -> tuple[list[Step], int]:
    """Train the stages, from the job's checkpoint if it has one, and save them if the job asks for it.

    Returns:
        The steps, and the iteration that they lead to.
    """
    before = Progress()

    def resume(optimizer: Any) -> Progress:
        nonlocal before
        before = _resume(job, stages, groups, optimizer)
        return before

    text = read_text(training, config)
    mask_vocabulary_padding(stages, vocab_size=text.vocab_size)
    steps = train(
        stages,
        groups,
        layout,
        text=text,
        options=training,
        forward_step=forward_step,
        start=resume,
        finish=partial(_save, job, stages, groups),
    )
    if show_steps and _is_leader():
        steps = show_progress(
            steps,
            None,
            describe=lambda _, step: f"loss {step.loss:.4f}",
            count=lambda step: (step.number, before.step + training.steps),
        )
    taken = list(steps)
    return taken, before.step + len(taken)


def _is_leader() -> bool:
    return torch.distributed.get_rank() == 0


def _set_hooks(job: BuildJob, config: ModelConfig, groups: ProcessGroupCollection) -> list[list[Placement]]:
    """Let the build draw or load weights, and return the list to which it appends the placements of each stage."""
    placements: list[list[Placement]] = []

    def draw(stages: list[MegatronModule]) -> list[MegatronModule]:
        draw_weights(stages, groups, vocab_size=get_vocab_size(config))
        return stages

    def load(stages: list[MegatronModule]) -> list[MegatronModule]:
        assert job.weights is not None
        find_loader(job.weights).load(stages, job.weights, groups)
        return stages

    def record_placements(stages: list[MegatronModule]) -> list[MegatronModule]:
        # Before wrapping: FSDP shards parameters when it wraps.
        placements.extend([named.placement for named in named_parameters(stage, groups)] for stage in stages)
        return stages

    # compose_hooks: the last of the model's own hooks may return None. Weights are drawn or loaded first, so that hooks
    # can change them.
    hooks: list[Hook] = [compose_hooks(config.pre_wrap_hooks), record_placements]
    is_loaded = any(one is not None for one in (job.modelopt_checkpoint, job.weights, job.checkpoint))
    if job.training is not None and not is_loaded:
        hooks.insert(0, draw)
    if job.weights is not None:
        hooks.insert(0, load)
    config.pre_wrap_hooks = hooks
    return placements


def _resume(job: BuildJob, stages: list[MegatronModule], groups: ProcessGroupCollection, optimizer: Any) -> Progress:
    """Load the job's checkpoint, if it has one, and check that the job's result can be saved."""
    progress = Progress()
    if job.checkpoint is not None:
        progress = load_checkpoint(stages, job.checkpoint, groups, optimizer=optimizer)
    if job.save is not None:
        last = progress.step + (0 if job.training is None else job.training.steps)
        check_target(job.save, last, force=job.replace_saved)
    return progress


def _save(
    job: BuildJob, stages: list[MegatronModule], groups: ProcessGroupCollection, optimizer: Any, progress: Progress
) -> None:
    if job.save is not None:
        model = ModelConfig.from_dict(job.document)  # that of the build has hooks more
        save_checkpoint(
            stages,
            job.save,
            groups,
            model=model,
            progress=progress,
            optimizer=optimizer,
            tokenizer=find_tokenizer_folder(job.weights, job.checkpoint),
            force=job.replace_saved,
        )


def _print_stderr(message: str) -> None:
    print(message, file=sys.stderr)  # noqa: T201
