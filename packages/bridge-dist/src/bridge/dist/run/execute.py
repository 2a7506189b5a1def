"""Build and training of a job on this rank."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule, TransformerConfig

from bridge.builders import Hook, compose_hooks
from bridge.config import ModelConfig
from bridge.dist.checkpoint.load import load_checkpoint
from bridge.dist.checkpoint.progress import Progress
from bridge.dist.checkpoint.save import check_target, save_checkpoint
from bridge.dist.engine.environment import prepare_process
from bridge.dist.engine.placement import Placement, named_parameters
from bridge.dist.engine.weights import draw_weights
from bridge.dist.job import BuildJob, get_vocab_size, read_text
from bridge.dist.layout import Layout
from bridge.dist.loaders import find_loader
from bridge.dist.run.peak_memory import reset_peak_memory
from bridge.dist.run.progress import show_progress
from bridge.dist.train.invariance import mask_vocabulary_padding, switch_off_dropout
from bridge.dist.train.step import Step, train

# The default seed of megatron.training, and its offset per pipeline rank.
_SEED = 1234
_SEED_STRIDE = 100


@dataclass(frozen=True, kw_only=True)
class BuiltRank:
    """A job on this rank: wrapped stages, the placements of their parameters in the whole model, and training steps."""

    stages: list[MegatronModule]
    placements: list[list[Placement]]
    steps: list[Step]


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
    prepare_process(builder.transformer_config)
    seed_random_states(builder.transformer_config, groups)
    leader = torch.distributed.get_rank() == 0
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

    # compose_hooks: the last of the model's own hooks may return None. Weights are drawn or loaded first, so
    # that hooks can change them.
    hooks: list[Hook] = [compose_hooks(config.pre_wrap_hooks), record_placements]
    if job.training is not None:
        if (dropout := switch_off_dropout(builder.transformer_config)) and leader:
            _print_stderr(f"{' and '.join(dropout)} set to 0: with dropout the losses would depend on the layout")
        if all(one is None for one in (job.modelopt_checkpoint, job.weights, job.checkpoint)):
            hooks.insert(0, draw)
    if job.weights is not None:
        builder.transformer_config.perform_initialization = False
        hooks.insert(0, load)
    config.pre_wrap_hooks = hooks
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
        _save(job, stages, groups, None, _resume(job, stages, groups))
    else:
        text = read_text(job.training, config)
        mask_vocabulary_padding(stages, vocab_size=text.vocab_size)
        taken = train(
            stages,
            groups,
            layout,
            text=text,
            options=job.training,
            forward_step=builder.forward_step,
            start=partial(_resume, job, stages, groups),
            finish=partial(_save, job, stages, groups),
        )
        if leader and show_steps:
            taken = show_progress(taken, job.training.steps, describe=lambda _, step: f"loss {step.loss:.4f}")
        steps = list(taken)
    return BuiltRank(stages=stages, placements=placements, steps=steps)


def _resume(
    job: BuildJob, stages: list[MegatronModule], groups: ProcessGroupCollection, optimizer: Any = None
) -> Progress:
    """Load the job's checkpoint, if it has one, and check that the job's result can be saved."""
    progress = Progress()
    if job.checkpoint is not None:
        progress = load_checkpoint(stages, job.checkpoint, groups, optimizer=optimizer)
    if job.save is not None:
        check_target(job.save, progress.step + (0 if job.training is None else job.training.steps))
    return progress


def _save(
    job: BuildJob, stages: list[MegatronModule], groups: ProcessGroupCollection, optimizer: Any, progress: Progress
) -> None:
    if job.save is not None:
        model = ModelConfig.from_dict(job.document)  # that of the build has hooks more
        save_checkpoint(stages, job.save, groups, model=model, progress=progress, optimizer=optimizer)


def seed_random_states(config: TransformerConfig, groups: ProcessGroupCollection, *, seed: int = _SEED) -> None:
    """Seed Python, numpy, torch and Megatron's random states as megatron.training does, differently per pipeline rank.

    Source: ``_set_random_seed`` of megatron.training 0.19.2.
    """
    seed += _SEED_STRIDE * groups.pp.rank()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed,
        te_rng_tracker=config.use_te_rng_tracker,
        inference_rng_tracker=config.inference_rng_tracker,
        use_cudagraphable_rng=config.cuda_graph_impl != "none",
    )


def _print_stderr(message: str) -> None:
    print(message, file=sys.stderr)  # noqa: T201
