"""Training with one CUDA graph per step, captured by megatron-core's `FullCudaGraphWrapper`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu.training import join_single_rank, make_job, make_train_options
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from bridge.dist.engine.weights import draw_weights
from bridge.dist.job import get_vocab_size
from bridge.dist.train.optimizer import set_up_optimizer
from bridge.dist.train.step import zero_gradients
from bridge.dist.train.text import Text

_WARM_UP = 2


def train_in_one_graph(model: str, overrides: tuple[str, ...], capture: bool) -> dict[str, list[float]]:
    """Train five steps; return losses and gradient norms.

    With ``capture``, the steps after the first two replay a graph.
    """
    job, options = make_job(model, overrides), make_train_options()
    losses, norms = [], []
    with join_single_rank(job) as rank:
        builder = job.make_builder(rank.config)
        vocab = get_vocab_size(rank.config)
        assert vocab is not None

        def draw(stages: list[Any]) -> list[Any]:
            draw_weights(stages, rank.groups, vocab_size=vocab)
            return stages

        def forward(samples: Iterator[dict[str, torch.Tensor]], stage: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            return builder.forward_step(stage, next(samples)["tokens"], rank.groups), _mean

        rank.config.pre_wrap_hooks.append(draw)
        # A graph repeats the random numbers of its capture unless its generators are registered with it.
        model_parallel_cuda_manual_seed(1234, use_cudagraphable_rng=capture, force_reset_rng=True)
        # No NaN check (DDP's default): it copies to the host, which a graph cannot capture.
        stages = builder.build_distributed_models(rank.groups, DistributedDataParallelConfig())
        text = Text.read(options.text, vocab_size=vocab)
        warm_up = _WARM_UP if capture else options.steps
        schedule = FullCudaGraphWrapper(get_forward_backward_func(), cuda_graph_warmup_steps=warm_up)
        with set_up_optimizer(stages) as optimizer:
            for index in range(options.steps):
                batch = text.make_batch(
                    index * options.global_batch_size, size=options.global_batch_size, seq_length=options.seq_length
                )
                microbatches = batch.split(options.micro_batch_size)
                zero_gradients(stages)
                optimizer.zero_grad()
                outputs = schedule(
                    forward_step_func=forward,
                    data_iterator=iter([{"tokens": tokens.cuda()} for tokens in microbatches]),
                    model=stages,
                    num_microbatches=len(microbatches),
                    seq_length=options.seq_length,
                    micro_batch_size=options.micro_batch_size,
                    forward_only=False,
                )
                _, norm, _ = optimizer.step()
                losses.append(torch.stack(outputs).mean().item())
                norms.append(float(norm))
        assert (FullCudaGraphWrapper.cuda_graph["training"] is not None) == capture
        schedule.reset_cuda_graph()  # NCCL waits for the graphs that contain its operations before it ends
    return {"losses": losses, "grad_norms": norms}


def _mean(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = losses.float().mean()
    return loss, loss.detach().clone()  # the schedule modifies the loss in place
