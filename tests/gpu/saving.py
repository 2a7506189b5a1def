"""Training that goes on from a checkpoint or a folder of transformers, which the GPU wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from gpu.settings import STEPS
from gpu.training import Curves, get_curves, join_single_rank, make_job, make_train_options
from megatron.core.transformer import MegatronModule

from bridge.config import ModelConfig
from bridge.dist.engine.weights import draw_weights
from bridge.dist.job import get_vocab_size
from bridge.dist.run.execute import build_and_train
from bridge.models.huggingface import save_weights

_BEFORE = 3


def train_in_two_parts(model: str, wrapper: str, distributed_optimizer: bool) -> Curves:
    """Train three steps and save a checkpoint, load it and train two; return losses and gradient norms of all five."""
    job = make_job(model, wrapper=wrapper, distributed_optimizer=distributed_optimizer)
    curves: Curves = {"losses": [], "grad_norms": []}
    with TemporaryDirectory() as folder:
        for part in (
            replace(job, training=make_train_options(_BEFORE), save=Path(folder)),
            replace(job, training=make_train_options(STEPS - _BEFORE), checkpoint=Path(folder)),
        ):
            with join_single_rank(part) as rank:
                found = get_curves(build_and_train(part, *rank))
            curves = {name: curves[name] + found[name] for name in curves}
    return curves


def train_from_folder(model: str, wrapper: str) -> Curves:
    """Save weights initialised by parameter name as a folder of transformers; train five steps from it."""
    with TemporaryDirectory() as parent:
        folder = Path(parent, "model")
        _save_folder(model, folder)
        job = replace(make_job(model, wrapper=wrapper, training=make_train_options()), weights=folder)
        with join_single_rank(job) as rank:
            return get_curves(build_and_train(job, *rank))


def _save_folder(model: str, folder: Path) -> None:
    job = make_job(model)
    with join_single_rank(job) as rank:

        def draw(stages: list[MegatronModule]) -> list[MegatronModule]:
            draw_weights(stages, rank.groups, vocab_size=get_vocab_size(rank.config))
            return stages

        rank.config.pre_wrap_hooks.append(draw)
        stages = build_and_train(job, *rank).stages
        save_weights(stages, folder, rank.groups, model=ModelConfig.from_dict(job.document))
