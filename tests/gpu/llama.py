"""Llama 3.2 1B: what its training holds and how fast it is, by Bridge and by megatron-core's own constructors."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from gpu.settings import LLAMA, SETTINGS, SMALL_LLAMA, SMALL_SEQUENCE, Setting
from gpu.training import TEXT, Joined, make_job, only_rank
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module

from bridge.config import Document
from bridge.dist.job import BuildJob
from bridge.dist.plan.plan import PlanOptions, plan
from bridge.dist.run.execute import build_and_train
from bridge.dist.train.batch import Batch
from bridge.dist.train.optimizer import LEARNING_RATE
from bridge.dist.train.step import TrainOptions, train
from bridge.dist.train.text import Text
from bridge.dist.wrapper import Wrapper
from bridge.models.gpt.layers import layer_spec

_WARM_UP, _TIMED, _ROUNDS = 2, 4, 3


def plan_memory(name: str) -> dict[str, Any]:
    """Return the plan of a setting: bytes by kind, FLOPs of a step, and what its layers are."""
    setting = SETTINGS[name]
    found = plan(
        Document.load(LLAMA, [f"seq_length={setting.seq_length}", *setting.overrides]),
        PlanOptions(
            batch=Batch(
                seq_length=setting.seq_length,
                micro_batch_size=setting.micro_batch_size,
                global_batch_size=setting.global_batch_size,
            ),
            world_size=1,
            wrapper=Wrapper(setting.wrapper),
            distributed_optimizer=setting.distributed_optimizer,
        ),
    )
    kinds = ("weight", "gradient", "optimizer", "activation", "unsharded", "total")
    sizes = {f"{kind}_bytes": getattr(found.worst, f"{kind}_bytes") for kind in kinds}
    return sizes | {"flops": found.worst.flops, "layers": found.layers}


def measure_memory(name: str, small: bool) -> dict[str, int]:
    """Train two steps under a setting; return bytes of the device.

    ``built`` are held by the wrapped model, ``between_steps`` by model and optimizer, ``peak`` at most in the second
    step: in the first the optimizer's state is still being made.
    """
    job, options = _prepare(SETTINGS[name], steps=2, small=small)
    with only_rank(job) as rank:
        before = _allocated()
        run = build_and_train(job, *rank)
        built = _allocated()
        between = peak = 0
        for _ in _train_with_bridge(job, run.stages, rank, options):
            between, peak = _allocated(), torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
    return {"built": built - before, "between_steps": between - before, "peak": peak - before}


class _Timed(NamedTuple):
    """A step of training."""

    loss: float
    seconds: float


class _Measured(NamedTuple):
    step_seconds: float
    peak: int
    loss: float


def measure_speed(name: str, own_layers: bool, small: bool) -> dict[str, dict[str, float]]:
    """Train by Bridge and by megatron-core alone, in turns; return medians by side.

    Args:
        name: The setting.
        own_layers: Megatron's own local layers on its side; otherwise both sides have Bridge's.
        small: A small model.
    """
    job, options = _prepare(SETTINGS[name], steps=_WARM_UP + _TIMED, small=small)
    sides: dict[str, Callable[[BuildJob, Joined, TrainOptions], Iterator[_Timed]]] = {
        "bridge": _bridge,
        "megatron": _megatron_with_local_layers if own_layers else _megatron_with_same_layers,
    }
    found: dict[str, list[_Measured]] = {side: [] for side in sides}
    with only_rank(job) as rank:
        for turn in range(_ROUNDS):
            for side in list(sides) if turn % 2 else list(reversed(sides)):
                found[side].append(_measured(sides[side](job, rank, options)))
    return {
        side: {field: statistics.median(getattr(each, field) for each in rounds) for field in _Measured._fields}
        for side, rounds in found.items()
    }


def _measured(training: Iterator[_Timed]) -> _Measured:
    before = _allocated()
    torch.cuda.reset_peak_memory_stats()
    steps = list(training)  # which builds first
    peak = torch.cuda.max_memory_allocated() - before
    return _Measured(statistics.median(step.seconds for step in steps[_WARM_UP:]), peak, steps[0].loss)


def _prepare(setting: Setting, *, steps: int, small: bool) -> tuple[BuildJob, TrainOptions]:
    length = SMALL_SEQUENCE if small else setting.seq_length
    job = make_job(
        LLAMA,
        [f"seq_length={length}", *setting.overrides, *(SMALL_LLAMA if small else ())],
        wrapper=setting.wrapper,
        distributed_optimizer=setting.distributed_optimizer,
    )
    options = TrainOptions(
        steps=steps,
        text=TEXT,
        seq_length=length,
        micro_batch_size=setting.micro_batch_size,
        global_batch_size=setting.global_batch_size,
    )
    return job, options


def _bridge(job: BuildJob, rank: Joined, options: TrainOptions) -> Iterator[_Timed]:
    # A configuration of its own: a build adds to its hooks.
    rank = rank._replace(config=type(rank.config).from_dict(job.document))
    yield from _train_with_bridge(job, build_and_train(job, *rank).stages, rank, options)


def _train_with_bridge(job: BuildJob, stages: list[Any], rank: Joined, options: TrainOptions) -> Iterator[_Timed]:
    text = Text.read(options.text, vocab_size=rank.config.vocab_size)  # type: ignore[attr-defined]
    step = job.make_builder(rank.config).forward_step
    for taken in train(stages, rank.groups, rank.layout, text=text, options=options, forward_step=step):
        yield _Timed(taken.loss, taken.seconds)


def _megatron_with_same_layers(job: BuildJob, rank: Joined, options: TrainOptions) -> Iterator[_Timed]:
    return _megatron(rank, options, layer_spec(rank.config, vp_stage=None, pp_rank=0))  # type: ignore[arg-type]


def _megatron_with_local_layers(job: BuildJob, rank: Joined, options: TrainOptions) -> Iterator[_Timed]:
    config: Any = rank.config
    return _megatron(rank, options, get_gpt_layer_local_spec(normalization=config.transformer.normalization))


def _megatron(rank: Joined, options: TrainOptions, spec: Any) -> Iterator[_Timed]:
    """Build and train with nothing of Bridge's but its configuration and its text."""
    config: Any = rank.config
    transformer = config.transformer
    model_parallel_cuda_manual_seed(1234)
    bare = GPTModel(
        config=transformer,
        transformer_layer_spec=spec,
        vocab_size=config.padded_vocab_size,
        max_sequence_length=config.seq_length,
        share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
        position_embedding_type=config.position_embedding_type,
        rotary_base=config.rotary_base,
        rope_scaling=config.rope_scaling,
        rope_scaling_factor=config.rope_scaling_factor,
        pg_collection=rank.groups,
    ).cuda()
    model = DistributedDataParallel(
        config=transformer,
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True, check_for_nan_in_grad=True),
        module=Float16Module(transformer, bare),
        pg_collection=rank.groups,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            min_lr=LEARNING_RATE,
            bf16=True,
            params_dtype=torch.bfloat16,
        ),
        [model],
    )
    text = Text.read(options.text, vocab_size=config.vocab_size)
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss
    try:
        for index in range(options.steps):
            start = time.perf_counter()
            batch = text.make_batch(
                index * options.global_batch_size, size=options.global_batch_size, seq_length=options.seq_length
            )
            loss = _step(model, optimizer, batch, options)
            yield _Timed(loss, time.perf_counter() - start)
    finally:  # or configuration and optimizer hold each other
        transformer.finalize_model_grads_func = transformer.grad_scale_func = None


def _step(model: DistributedDataParallel, optimizer: Any, batch: torch.Tensor, options: TrainOptions) -> float:
    model.zero_grad_buffer()
    optimizer.zero_grad()
    outputs = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=iter(batch.split(options.micro_batch_size)),
        model=[model],
        num_microbatches=options.global_batch_size // options.micro_batch_size,
        seq_length=options.seq_length,
        micro_batch_size=options.micro_batch_size,
        forward_only=False,
    )
    optimizer.step()
    return torch.stack(outputs).mean().item()


def _forward(samples: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
    tokens = next(samples).cuda(non_blocking=True)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    losses = model(inputs, positions, None, labels=labels)

    def reduce(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = losses.float().mean()
        return loss, loss.detach().clone()  # the schedule works in place

    return losses, reduce


def _allocated() -> int:
    """Bytes in use, with nothing left to collect; the peak starts anew."""
    gc.collect()
    return torch.cuda.memory_allocated()
