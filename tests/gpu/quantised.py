"""Restoring and training of a model that ModelOpt quantised and saved."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from gpu.training import join_single_rank, make_job, make_train_options
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from bridge.config import ModelConfig
from bridge.dist.engine.stages import unwrap
from bridge.dist.job import BuildJob
from bridge.dist.run.execute import build_and_train
from bridge.dist.wrapper import Wrapper


def rebuild_and_train(model: str) -> dict[str, Any]:
    """Restore a quantised model and train it; return the largest difference of its logits, and the losses."""
    with TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model.pt"
        expected = _quantise_and_save(model, checkpoint)
        overrides = ["restore_modelopt_state=true"]
        job = BuildJob(
            document=make_job(model, overrides).document, wrapper=Wrapper.DDP, modelopt_checkpoint=checkpoint
        )
        with join_single_rank(job) as rank:
            (stage,) = build_and_train(job, *rank).stages
            found = _compute_logits(unwrap(stage), rank.config)
        job = BuildJob(
            document=job.document, wrapper=Wrapper.DDP, modelopt_checkpoint=checkpoint, training=make_train_options(2)
        )
        with join_single_rank(job) as rank:
            steps = build_and_train(job, *rank).steps
    return {"difference": (found - expected).abs().max().item(), "losses": [step.loss for step in steps]}


def _quantise_and_save(model: str, checkpoint: Path) -> torch.Tensor:
    job = make_job(model)
    with join_single_rank(job) as rank:
        model_parallel_cuda_manual_seed(1)
        built = job.make_builder(rank.config).build_model(rank.groups).cuda()
        mtq.quantize(built, mtq.INT8_DEFAULT_CFG, lambda model: _compute_logits(model, rank.config))
        mto.save(built, checkpoint)
        return _compute_logits(built, rank.config)


@torch.no_grad()
def _compute_logits(model: Any, config: ModelConfig) -> torch.Tensor:
    vocab: int = config.vocab_size  # type: ignore[attr-defined]
    tokens = torch.randint(vocab, (2, 16), generator=torch.Generator().manual_seed(7))
    logits: torch.Tensor = model(tokens.cuda(), torch.arange(16).expand(2, -1).cuda(), None)
    return logits.float().cpu()
