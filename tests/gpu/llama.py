"""Memory and speed of training Llama 3.2 1B, with Bridge and with megatron-core alone."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from gpu.settings import LLAMA, SETTINGS, SMALL_LLAMA, SMALL_SEQUENCE, Setting
from gpu.training import TEXT, JoinedRank, join_single_rank, make_job
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
    """Return the plan of a setting: bytes by kind, FLOPs per step, and the layers."""
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
    """Train two steps under a setting; return allocated bytes of the GPU.

    ``built`` counts the wrapped model, ``between_steps`` the model and the optimizer, ``peak`` the maximum of the
    second step: the first one still creates the optimizer's state.
    """
    job, options = _prepare(SETTINGS[name], steps=2, small=small)
    with join_single_rank(job) as rank:
        before = _get_allocated_bytes()
        run = build_and_train(job, *rank)
        built = _get_allocated_bytes()
        between = peak = 0
        for _ in _train_with_bridge(job, run.stages, rank, options):
            between, peak = _get_allocated_bytes(), torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
    return {"built": built - before, "between_steps": between - before, "peak": peak - before}


class _TimedStep(NamedTuple):
    """Loss and duration of a training step."""

    loss: float
    seconds: float


class _RunCosts(NamedTuple):
    step_seconds: float
    peak: int
    loss: float


def measure_speed(name: str, own_layers: bool, small: bool) -> dict[str, dict[str, float]]:
    """Train alternately with Bridge and with megatron-core alone; return medians by side.

    Args:
        name: The setting.
        own_layers: Use megatron-core's local layers on its side; otherwise both sides use Bridge's.
        small: Use a small model.
    """
    job, options = _prepare(SETTINGS[name], steps=_WARM_UP + _TIMED, small=small)
    sides: dict[str, Callable[[BuildJob, JoinedRank, TrainOptions], Iterator[_TimedStep]]] = {
        "bridge": _build_and_train_with_bridge,
        "megatron": _train_with_megatron_layers if own_layers else _train_with_bridge_layers,
    }
    found: dict[str, list[_RunCosts]] = {side: [] for side in sides}
    with join_single_rank(job) as rank:
        for turn in range(_ROUNDS):
            for side in list(sides) if turn % 2 else list(reversed(sides)):
                found[side].append(_measure_run(sides[side](job, rank, options)))
    return {
        side: {field: statistics.median(getattr(each, field) for each in rounds) for field in _RunCosts._fields}
        for side, rounds in found.items()
    }


def _measure_run(training: Iterator[_TimedStep]) -> _RunCosts:
    before = _get_allocated_bytes()
    torch.cuda.reset_peak_memory_stats()
    steps = list(training)  # the first step builds the model
    peak = torch.cuda.max_memory_allocated() - before
    return _RunCosts(statistics.median(step.seconds for step in steps[_WARM_UP:]), peak, steps[0].loss)


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


def _build_and_train_with_bridge(job: BuildJob, rank: JoinedRank, options: TrainOptions) -> Iterator[_TimedStep]:
    # A fresh configuration per round: a build appends to its hooks.
    rank = rank._replace(config=type(rank.config).from_dict(job.document))
    yield from _train_with_bridge(job, build_and_train(job, *rank).stages, rank, options)


def _train_with_bridge(
    job: BuildJob, stages: list[Any], rank: JoinedRank, options: TrainOptions
) -> Iterator[_TimedStep]:
    text = Text.read(options.text, vocab_size=rank.config.vocab_size)  # type: ignore[attr-defined]
    step = job.make_builder(rank.config).forward_step
    for taken in train(stages, rank.groups, rank.layout, text=text, options=options, forward_step=step):
        yield _TimedStep(taken.loss, taken.seconds)


def _train_with_bridge_layers(job: BuildJob, rank: JoinedRank, options: TrainOptions) -> Iterator[_TimedStep]:
    return _train_with_megatron(rank, options, layer_spec(rank.config, vp_stage=None, pp_rank=0))  # type: ignore[arg-type]


def _train_with_megatron_layers(job: BuildJob, rank: JoinedRank, options: TrainOptions) -> Iterator[_TimedStep]:
    config: Any = rank.config
    return _train_with_megatron(rank, options, get_gpt_layer_local_spec(normalization=config.transformer.normalization))


def _train_with_megatron(rank: JoinedRank, options: TrainOptions, spec: Any) -> Iterator[_TimedStep]:
    """Build and train with megatron-core; only the configuration and the text are Bridge's."""
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
            loss = _run_step(model, optimizer, batch, options)
            yield _TimedStep(loss, time.perf_counter() - start)
    finally:  # break the reference cycle of configuration and optimizer, which keeps their memory
        transformer.finalize_model_grads_func = transformer.grad_scale_func = None


def _run_step(model: DistributedDataParallel, optimizer: Any, batch: torch.Tensor, options: TrainOptions) -> float:
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
        return loss, loss.detach().clone()  # the schedule modifies the loss in place

    return losses, reduce


def _get_allocated_bytes() -> int:
    """Return the allocated bytes of the GPU after garbage collection."""
    gc.collect()
    return torch.cuda.memory_allocated()
