"""A few training steps by Megatron's own schedule and optimizer, comparable between layouts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.utils import get_model_config

from bridge.dist.batch import Batch
from bridge.dist.engine.copies import check_gradients
from bridge.dist.forward import ForwardStep, next_token_step
from bridge.dist.layout import Layout
from bridge.dist.patch import Replacement, replaced
from bridge.dist.stages import unwrapped
from bridge.dist.text import Text

LEARNING_RATE = 1e-4
# Far above what rounding leaves of a gradient that is zero (of an attention key's bias, say), which Adam would blow up
# to a full step in one direction or the other; far below the gradients that matter.
_EPSILON = 1e-5
_FP16_LOSS_SCALE = 2.0**16


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Batch):
    """How many steps, on which text, and the sizes of a batch."""

    steps: int
    text: Path


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one training step gave, the same on every rank; no gradient norm for a step that overflowed in fp16.

    ``seconds`` are this rank's, until its device was done.
    """

    loss: float
    grad_norm: float | None
    seconds: float


def train(
    stages: list[MegatronModule],
    pg_collection: ProcessGroupCollection,
    layout: Layout,
    *,
    text: Text,
    options: TrainOptions,
    forward_step: ForwardStep = next_token_step,
) -> Iterator[Step]:
    """Train, one step per item taken. The loss is the mean over the tokens of the global batch, before the step.

    Every rank of the layout must take every step. ``forward_step`` is that of the builder that made the stages.

    Raises:
        CopyError: Tensor-parallel ranks have different gradients of a parameter that is not split.
    """
    group_size = get_model_config(stages[0]).microbatch_group_size_per_vp_stage
    microbatches = options.microbatches(layout, group_size=group_size)
    with optimizer_of(stages) as optimizer:
        for index in range(options.steps):
            start = _time_when_done()
            batch = text.batch(index, size=options.global_batch_size, seq_length=options.seq_length)
            mine = batch.view(layout.dp, microbatches, options.micro_batch_size, -1)[pg_collection.dp.rank()]
            zero_gradients(stages)
            optimizer.zero_grad()
            outputs = run_microbatches(stages, pg_collection, layout, mine, forward_step=forward_step)
            if index == 0:
                check_gradients(stages, pg_collection)
            _, grad_norm, _ = optimizer.step()
            loss = _global_loss([output["loss"] for output in outputs], pg_collection)
            norm = None if grad_norm is None else float(grad_norm)
            yield Step(loss=loss, grad_norm=norm, seconds=_time_when_done() - start)


def _time_when_done() -> float:
    """Read the clock when the device has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


_LEFT_TO_OTHERS: Mapping[str, tuple[Callable[[TransformerConfig], object], str]] = {
    "overlap_moe_expert_parallel_comm": (
        lambda c: c.overlap_moe_expert_parallel_comm,
        "set it, and delay_wgrad_compute, to false: it takes steps that return plans of a schedule",
    ),
    "num_microbatches_with_partial_activation_checkpoints": (
        lambda c: c.num_microbatches_with_partial_activation_checkpoints is not None,
        "set it to null: it takes steps that are told what to recompute",
    ),
    "qk_clip": (lambda c: c.qk_clip, "set it to false: nothing clips the weights after a step"),
    "log_max_attention_logit": (lambda c: c.log_max_attention_logit, "set it to false: nothing logs it"),
    "moe_expert_rank_capacity_factor": (
        lambda c: c.moe_expert_rank_capacity_factor is not None,
        "set it to null, and moe_paged_stash to false: nothing repeats a step that dropped tokens",
    ),
    "cuda_graph_impl": (
        lambda c: c.cuda_graph_impl in ("transformer_engine", "full_iteration"),
        "set it to local or none: nothing captures the graphs",
    ),
}
"""What megatron-core 0.19.2 leaves to the training loop, and the one here does not do."""


def left_to_others(config: TransformerConfig) -> Iterator[tuple[str, str]]:
    """Name the fields of a configuration that ``train`` would pass over, or fail for, each with what to set."""
    for name, (asked, advice) in _LEFT_TO_OTHERS.items():
        if asked(config):
            yield name, advice


@contextlib.contextmanager
def optimizer_of(stages: list[MegatronModule], *, use_gloo_process_groups: bool = True) -> Iterator[Any]:
    """Make Megatron's Adam with a constant rate; the stages' configuration knows how to finish a step meanwhile.

    Were it not put back, configuration, distributed optimizer and stages would hold each other, and Python would never
    free them: part of the circle is held by torch's C++.
    """
    config = get_model_config(stages[0])
    ddp_config = stages[0].ddp_config
    assert isinstance(ddp_config, DistributedDataParallelConfig)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            min_lr=LEARNING_RATE,
            adam_eps=_EPSILON,
            fp16=config.fp16,
            bf16=config.bf16,
            initial_loss_scale=_FP16_LOSS_SCALE,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=ddp_config.use_distributed_optimizer,
            overlap_param_gather=ddp_config.overlap_param_gather,
        ),
        stages,
        use_gloo_process_groups=use_gloo_process_groups,
    )
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    functions: dict[str, object] = {
        "finalize_model_grads_func": finalize_model_grads,
        "grad_scale_func": optimizer.scale_loss,
    }
    if ddp_config.overlap_grad_reduce:
        no_sync = [stage.no_sync for stage in stages]
        functions["no_sync_func"] = no_sync if len(stages) > 1 else no_sync[0]
    with replaced(*(Replacement(config, name, function) for name, function in functions.items())):
        yield optimizer


def zero_gradients(stages: Sequence[MegatronModule]) -> None:
    """Set the buffers of gradients that stages have to zero, as before each step."""
    for stage in stages:
        zero: Callable[[], None] | None = getattr(stage, "zero_grad_buffer", None)
        if zero is not None:
            zero()


def run_microbatches(
    stages: list[MegatronModule],
    pg_collection: ProcessGroupCollection,
    layout: Layout,
    samples: torch.Tensor,
    *,
    forward_step: ForwardStep,
) -> list[dict[str, torch.Tensor]]:
    """Run forward and backward passes by Megatron's schedule, and reduce the gradients.

    Every rank of the layout must do so, within ``optimizer_of``.

    Args:
        stages: Those of this rank.
        pg_collection: The process groups of this rank.
        layout: Its pipeline decides on the schedule.
        samples: This rank's tokens, shape [microbatches, samples of each, sequence + 1].
        forward_step: That of the builder that made the stages.

    Returns:
        On the last stage the loss of each microbatch.
    """
    schedule = get_forward_backward_func(pp_size=layout.pp, vp_size=layout.vp if layout.vp > 1 else None)
    outputs: list[dict[str, torch.Tensor]] = schedule(
        forward_step_func=partial(_forward, forward_step=forward_step, pg_collection=pg_collection),
        data_iterator=[iter(samples) for _ in stages] if len(stages) > 1 else iter(samples),
        model=stages,
        num_microbatches=samples.shape[0],
        seq_length=samples.shape[2] - 1,
        micro_batch_size=samples.shape[1],
        forward_only=False,
    )
    return outputs


def _forward(
    samples: Iterator[torch.Tensor],
    stage: MegatronModule,
    *,
    forward_step: ForwardStep,
    pg_collection: ProcessGroupCollection,
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]]:
    """Run a stage on the next microbatch; Megatron's schedule calls the returned function on the last stage."""
    output = forward_step(stage, next(samples).to(torch.device("cuda")), pg_collection)

    def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.float().mean()
        # The schedule multiplies by the context-parallel size, and works in place (megatron-core 0.19.2): undo the
        # one, and report a copy because of the other.
        return loss / pg_collection.cp.size(), {"loss": loss.detach().clone()}

    return output, mean_loss


def _global_loss(losses: Sequence[torch.Tensor], pg_collection: ProcessGroupCollection) -> float:
    """Average over the data-parallel ranks, and tell the ranks that are not on the last stage."""
    device = torch.device("cuda")
    loss = torch.stack(list(losses)).mean() if losses else torch.zeros((), device=device)
    if losses:
        torch.distributed.all_reduce(loss, group=pg_collection.dp_cp)
        loss /= pg_collection.dp_cp.size()
    torch.distributed.broadcast(loss, group_src=pg_collection.pp.size() - 1, group=pg_collection.pp)
    return loss.item()


def switch_off_dropout(config: TransformerConfig) -> list[str]:
    """Set the dropout rates of a configuration to zero and name those that were not.

    Each tensor-parallel rank draws its own dropout masks, so that with dropout the losses depend on the layout.
    """
    names = [name for name in ("hidden_dropout", "attention_dropout") if getattr(config, name)]
    for name in names:
        setattr(config, name, 0.0)
    return names


def mask_vocabulary_padding(stages: Sequence[MegatronModule], *, vocab_size: int) -> None:
    """Give the padding of the vocabulary no probability, in stages that hold an output layer.

    How many rows pad the vocabulary depends on the tensor-parallel size, and a padded row takes part in the softmax.
    """
    for stage in stages:
        layer = getattr(unwrapped(stage), "output_layer", None)
        if layer is not None:
            layer.register_forward_hook(partial(_mask_padding, vocab_size=vocab_size))


def _mask_padding(
    layer: Any, _: object, output: tuple[torch.Tensor, torch.Tensor | None], *, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    logits, bias = output
    width = logits.shape[-1]
    real = vocab_size - layer.tp_group.rank() * width
    if real >= width:
        return output
    padding = torch.arange(width, device=logits.device) >= real
    return logits.masked_fill(padding, torch.finfo(logits.dtype).min), bias
