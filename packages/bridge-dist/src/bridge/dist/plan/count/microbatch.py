"""Cost of a microbatch in each chunk of a rank: run forward and backward once, and cached."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch.utils.flop_counter import FlopCounterMode

from bridge.config import ModelConfig
from bridge.dist.engine.builder import DistributedModelBuilder
from bridge.dist.engine.placement import list_layer_indices
from bridge.dist.engine.stages import unwrap
from bridge.dist.layout import Layout
from bridge.dist.plan.count.attention import ATTENTION_FLOPS, use_fused_attention
from bridge.dist.plan.count.collectives import Calls, Collectives, count_tensor_bytes, list_groups, map_group_names
from bridge.dist.plan.count.loss import record_logit_gradients
from bridge.dist.plan.count.memory import SavedMemory, count_storage_bytes, list_weight_workspaces
from bridge.dist.plan.count.operations import OperationCounter
from bridge.dist.plan.count.recomputed import watch_recomputation
from bridge.dist.plan.count.shared import record_shared_tensors
from bridge.dist.plan.results import Operations
from bridge.dist.train.batch import Batch


class Message(NamedTuple):
    """A tensor that one pipeline stage sends to the next, which sends back its gradient."""

    shape: torch.Size
    bytes: int

    @classmethod
    def describe(cls, tensor: torch.Tensor) -> Self:
        """Return the message that sends a tensor."""
        return cls(tensor.shape, count_tensor_bytes(tensor))


PassedShapes = dict[int, torch.Size]
"""Shapes that stages pass on, by place in the whole pipeline; only of measured stages."""


class PassWork(NamedTuple):
    """Operations and collectives of a forward or a backward pass."""

    operations: Operations
    calls: Calls


@dataclass(frozen=True, kw_only=True)
class Work:
    """Cost of one microbatch in a chunk: bytes saved for the backward pass, FLOPs, operations, collectives.

    ``shared`` bytes are saved once for all microbatches. ``temporary`` is by how much the backward pass exceeds
    ``kept``: by the gradients of the logits, or by what it recomputes. ``workspaces`` are the bytes of 8-bit copies of
    weights.
    ``weight_gradient_flops`` is the part of ``flops`` that computes gradients of weights. ``received`` is the message
    from the previous stage, ``passed_on`` that to the next stage; None at the ends of the pipeline.
    """

    kept: int
    shared: int
    temporary: int
    workspaces: int
    forward_flops: int
    flops: int
    weight_gradient_flops: int
    forward: PassWork
    backward: PassWork
    received: Message | None
    passed_on: Message | None

    @property
    def calls(self) -> Calls:
        """The collectives of both passes."""
        calls = Calls.empty()
        calls.add(self.forward.calls)
        calls.add(self.backward.calls)
        return calls


_WEIGHT_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
"""Products of activations with weights; those of two activations, in attention, are batched or fused."""

_WITHIN_LAYERS = ("tp", "cp", "ep", "expt_tp", "tp_ep", "tp_cp")
"""Groups whose ranks share the work of a layer."""

_RECOMPUTE_FIELDS = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")

Memo = dict[Any, Work]
"""Cache of the cost of a microbatch, by the signature of a chunk and the sizes of its groups."""


class RankStages(NamedTuple):
    """The stages of a rank, with everything needed to run them."""

    stages: list[MegatronModule]
    builder: DistributedModelBuilder[MegatronModule, ModelConfig]
    groups: ProcessGroupCollection
    layout: Layout
    batch: Batch


def run_chunks(rank: RankStages, memo: Memo, passed: PassedShapes) -> list[Work]:
    """Return the cost of a microbatch in each chunk, running only chunks that are not in ``memo``.

    ``passed`` gives the shapes of their inputs; the shapes of their outputs are added to it.
    """
    works = []
    for index, stage in enumerate(rank.stages):
        place = index * rank.layout.pp + rank.groups.pp.rank()
        work = _measure_chunk(rank, stage, passed.get(place - 1) or _hidden_states_shape(rank), memo)
        if work.passed_on:
            passed[place] = work.passed_on.shape
        works.append(work)
    return works


def _hidden_states_shape(rank: RankStages) -> torch.Size:
    """Return the shape of a decoder's hidden states for this rank's part of the sequence."""
    config = rank.builder.transformer_config
    length = rank.batch.seq_length // rank.groups.cp.size()
    if config.sequence_parallel:
        length //= rank.groups.tp.size()
    return torch.Size((length, rank.batch.micro_batch_size, config.hidden_size))


def _measure_chunk(rank: RankStages, stage: MegatronModule, input_shape: torch.Size, memo: Memo) -> Work:
    sizes = {kind: group.size() for kind, group in list_groups(rank.groups)}
    chunk = (
        _chunk_signature(unwrap(stage)),
        _list_precisions(rank.builder.transformer_config, stage),
        *(repr(getattr(rank.builder.transformer_config, name)) for name in _RECOMPUTE_FIELDS),
        input_shape,
        rank.batch.micro_batch_size,
        rank.batch.seq_length,
    )
    within = (chunk, *(sizes.get(kind) for kind in _WITHIN_LAYERS))
    anywhere = (chunk, *sizes.items())
    work = memo.get(within) or memo.get(anywhere)
    if work is None:
        work = _run_chunk(rank, stage, input_shape)
        # The sizes of pp and dp affect only chunks whose layers communicate in those groups.
        stays_within = {group for group, _, _ in work.calls.size} <= set(_WITHIN_LAYERS)
        memo[within if stays_within else anywhere] = work
    return work


def _list_precisions(config: TransformerConfig, stage: MegatronModule) -> Any:
    """Return the 8-bit format and recipe of a chunk, and whether each layer is left in half precision."""
    in_half = (is_first_last_bf16_layer(config, layer) for layer in list_layer_indices(stage))
    return (config.fp8, config.fp8_recipe, config.fp8_param, *in_half) if config.fp8 else None


def _chunk_signature(model: torch.nn.Module) -> Any:
    """Return a key that is equal for chunks of equal cost: their modules and parameters without layer numbers."""
    shapes = tuple(
        (re.sub(r"\.\d+\.", ".", name), parameter.shape, parameter.dtype)
        for name, parameter in model.named_parameters()
    )
    return (repr(model), shapes, getattr(model, "pre_process", None), getattr(model, "post_process", None))


def _run_chunk(rank: RankStages, stage: MegatronModule, input_shape: torch.Size) -> Work:
    """Run one microbatch forward and backward through a chunk. Chunks with an embedding ignore ``input_shape``."""
    model: Any = unwrap(stage)
    saved, sent = SavedMemory(stage), Collectives(map_group_names(rank.groups))
    flops = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
    operations = OperationCounter(model, is_fp8=bool(rank.builder.transformer_config.fp8))
    saved_then: list[int] = []  # whenever a part has been recomputed
    with (
        saved,
        flops,
        sent,
        operations,
        use_fused_attention(),
        record_shared_tensors() as shared,
        record_logit_gradients() as logit_gradients,
        watch_recomputation(lambda: saved_then.append(saved.count(shared)[0])),
    ):
        received = None if getattr(model, "pre_process", True) else _set_input(model, rank, input_shape)
        # One token more than the sequence has, because each position predicts the next token.
        tokens = torch.empty(rank.batch.micro_batch_size, rank.batch.seq_length + 1, dtype=torch.long)
        output = rank.builder.forward_step(stage, tokens, rank.groups)
        forward_flops, (bytes_kept, bytes_shared) = flops.get_total_flops(), saved.count(shared)
        weight_flops = sum(flops.get_flop_counts()["Global"].get(product, 0) for product in _WEIGHT_PRODUCTS)
        forward = PassWork(operations.take(), sent.take())
        if getattr(model, "post_process", True):
            passed_on = None
            output.float().mean().backward()  # the loss of a training step, see `run_microbatches`
        else:
            passed_on = Message.describe(output)
            output.backward(torch.empty_like(output))
    return Work(
        kept=bytes_kept,
        shared=bytes_shared,
        # The gradients of the logits are freed before the first layer is recomputed.
        temporary=max(0, *logit_gradients, *(size - bytes_kept for size in saved_then)),
        workspaces=count_storage_bytes(list_weight_workspaces(stage)),
        forward_flops=forward_flops,
        flops=flops.get_total_flops(),
        weight_gradient_flops=weight_flops,  # each product with a weight has one for its gradient, of the same size
        forward=forward,
        backward=PassWork(operations.take(), sent.take()),
        received=received,
        passed_on=passed_on,
    )


def _set_input(model: Any, rank: RankStages, shape: torch.Size) -> Message:
    """Set the input that a chunk gets from the previous stage; return the message."""
    received = torch.empty(shape, dtype=rank.builder.transformer_config.pipeline_dtype, requires_grad=True)
    model.set_input_tensor(received)
    return Message.describe(received)
