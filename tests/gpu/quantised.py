"""A model that ModelOpt quantised, saved, rebuilt by Bridge and trained."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from gpu.training import few_steps, make_job, only_rank
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from bridge.config import ModelConfig
from bridge.dist.engine.stages import unwrap
from bridge.dist.job import BuildJob
from bridge.dist.run.execute import build_and_train
from bridge.dist.wrapper import Wrapper


def rebuild_and_train(model: str) -> dict[str, Any]:
    """Return the largest difference of logits between the quantised model and the rebuilt one, and losses after."""
    with TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model.pt"
        expected = _quantise_and_save(model, checkpoint)
        overrides = ["restore_modelopt_state=true"]
        job = BuildJob(
            document=make_job(model, overrides).document, wrapper=Wrapper.DDP, modelopt_checkpoint=checkpoint
        )
        with only_rank(job) as rank:
            (stage,) = build_and_train(job, *rank).stages
            found = _logits(unwrap(stage), rank.config)
        job = BuildJob(
            document=job.document, wrapper=Wrapper.DDP, modelopt_checkpoint=checkpoint, training=few_steps(2)
        )
        with only_rank(job) as rank:
            steps = build_and_train(job, *rank).steps
    return {"difference": (found - expected).abs().max().item(), "losses": [step.loss for step in steps]}


def _quantise_and_save(model: str, checkpoint: Path) -> torch.Tensor:
    job = make_job(model)
    with only_rank(job) as rank:
        model_parallel_cuda_manual_seed(1)
        built = job.make_builder(rank.config).build_model(rank.groups).cuda()
        mtq.quantize(built, mtq.INT8_DEFAULT_CFG, lambda model: _logits(model, rank.config))
        mto.save(built, checkpoint)
        return _logits(built, rank.config)


@torch.no_grad()
def _logits(model: Any, config: ModelConfig) -> torch.Tensor:
    vocab: int = config.vocab_size  # type: ignore[attr-defined]
    tokens = torch.randint(vocab, (2, 16), generator=torch.Generator().manual_seed(7))
    logits: torch.Tensor = model(tokens.cuda(), torch.arange(16).expand(2, -1).cuda(), None)
    return logits.float().cpu()
