"""What a rank holds, computes and sends: its real stages built, wrapped and run on the meta device, and counted."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule
from torch.distributed import ProcessGroup, distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bridge.builders import compose_hooks
from bridge.config import ModelConfig
from bridge.dist.cpu import on_meta
from bridge.dist.engine.builder import DistributedModelBuilder
from bridge.dist.engine.environment import leave_out_cuda_graphs
from bridge.dist.engine.placement import Placement, layer_indices, named_parameters
from bridge.dist.engine.stages import layers_of, unwrapped
from bridge.dist.job import BuildJob, make_builder
from bridge.dist.layout import Layout
from bridge.dist.patch import Replacement, replaced
from bridge.dist.plan.count.memory import local
from bridge.dist.plan.count.schedule import passes
from bridge.dist.plan.virtual_rank.groups import as_rank
from bridge.dist.plan.virtual_rank.routing import equal_shares
from bridge.dist.plan.virtual_rank.sharding import (
    WholeMemory,
    is_group,
    sharded_gradients,
    sharding_on_meta,
    start_gathering,
    weights,
)
from bridge.dist.train.batch import Batch
from bridge.dist.train.optimizer import optimizer_of
from bridge.dist.train.step import run_microbatches, zero_gradients
from bridge.dist.wrapper import Wrapper

Sent = Counter[tuple[str, int, str]]
"""Bytes by group, its size, and operation."""


class Calls(NamedTuple):
    """Collectives of a piece of work: how many and how large, by group, its size and operation."""

    number: Sent
    size: Sent

    @classmethod
    def none(cls) -> Self:
        """Nothing sent."""
        return cls(Counter(), Counter())

    def add(self, other: Calls, times: int = 1) -> None:
        """Add the calls of something that is done several times."""
        for mine, theirs in zip(self, other, strict=True):
            for key, value in theirs.items():
                mine[key] += value * times

    def less(self, other: Calls) -> Calls:
        """Return the calls without others."""
        calls = Calls.none()
        calls.add(self)
        calls.add(other, -1)
        return calls


class Message(NamedTuple):
    """What one stage of a pipeline sends the next: a tensor, of which the gradient comes back."""

    shape: torch.Size
    bytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """Return that of a tensor."""
        return cls(tensor.shape, _tensor_bytes(tensor))


Passed = dict[int, torch.Size]
"""The shape of what a stage passes on, by its place in the whole pipeline, as far as it was measured."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one microbatch takes in a chunk: bytes kept for the backward pass, FLOPs, collectives.

    ``received`` is what comes from the stage before, ``passed_on`` what goes to the stage after; None at the ends of
    the pipeline.
    """

    kept: int
    forward_flops: int
    flops: int
    calls: Calls
    received: Message | None
    passed_on: Message | None


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A chunk of a rank: its layers, its number of parameters, and what a microbatch takes."""

    layers: list[int]
    parameters: int
    work: Work


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What a rank holds, in bytes; its chunks; where its parameters stand in the whole model; calls of a step's end."""

    rank: int
    weights: int
    gradients: int
    master: int
    state: int
    buckets: list[int]
    chunks: list[Chunk]
    placements: list[tuple[Placement, bool]]
    """And whether a parameter is of an expert, which lives on this expert-parallel rank only."""
    buffers: int
    """Elements of the buffers that checkpoints hold."""
    whole: int
    """The most that a wrapper that shards weights makes whole at a time."""
    traffic: Traffic
    layers: str
    """Whose layers they are."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of a step: of its first microbatches and its end, and of each round of so many microbatches more."""

    microbatches: int
    first: Calls
    round_size: int = 1
    more: Calls

    def of(self, microbatches: int) -> Calls:
        """Return the collectives of a step of so many microbatches, whole rounds more than the first."""
        calls = Calls.none()
        calls.add(self.first)
        calls.add(self.more, (microbatches - self.microbatches) // self.round_size)
        return calls


_WITHIN_LAYERS = ("tp", "cp", "ep", "expt_tp", "tp_ep", "tp_cp")
"""Groups whose ranks share the work of a layer."""

Memo = dict[Any, Work]
"""What microbatches take in chunks that were seen before."""


def measure(
    job: BuildJob, layout: Layout, batch: Batch, *, rank: int, memo: Memo, passed: Passed | None = None
) -> Rank:
    """Build, wrap and run the stages of a rank.

    Args:
        job: What is built, and how it is wrapped.
        layout: The sizes of the job.
        batch: Of a step.
        rank: Which one; those of earlier pipeline stages come first if they share ``passed``.
        memo: What chunks took that were seen before, to be looked up and added to.
        passed: What stages pass on, to be looked up and added to. A stage that is not in it passes on the hidden states
            of the sequence; so does every last rank of a pipeline to the first, as only the last virtual stage may
            predict several tokens (megatron-core 0.19.2).

    Raises:
        TrainingError: The batch does not divide over the ranks.
    """
    is_fsdp = job.wrapper in (Wrapper.MEGATRON_FSDP, Wrapper.TORCH_FSDP2)
    sharding = sharding_on_meta() if is_fsdp else contextlib.nullcontext()
    embedding_ranks = job.embedding_ranks(ModelConfig.from_dict(job.document))
    as_this_rank = as_rank(layout, rank, embedding_ranks=embedding_ranks)
    with on_meta(), equal_shares(), as_this_rank as groups, sharding, _alike():
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        config = ModelConfig.from_dict(job.document)
        builder = make_builder(config)
        leave_out_cuda_graphs(builder.transformer_config)
        builder.transformer_config.perform_initialization = False  # there are no values to draw
        placements: list[tuple[Placement, bool]] = []

        def note(stages: list[MegatronModule]) -> list[MegatronModule]:
            placements.extend(
                (named.placement, not getattr(named.parameter, "allreduce", True))
                for stage in stages
                for named in named_parameters(stage, groups)
            )
            return stages

        config.pre_wrap_hooks = [compose_hooks(config.pre_wrap_hooks), note]  # the last of the model's may return None
        options = job.options(builder.transformer_config)
        ddp_config = options.ddp_config
        if ddp_config is not None:  # there are no values to check
            ddp_config = replace(ddp_config, check_for_nan_in_grad=False)
        stages = builder.build_distributed_models(
            groups,
            ddp_config=ddp_config,
            use_megatron_fsdp=options.use_megatron_fsdp,
            use_torch_fsdp2=options.use_torch_fsdp2,
            wrap_with_ddp=options.wrap_with_ddp,
        )
        run = _Run(stages, builder, groups, layout, batch, {} if passed is None else passed)
        parameters = [sum(local(parameter).numel() for parameter in stage.parameters()) for stage in stages]
        master, state = _optimizer_bytes(stages) if options.wrap_with_ddp else (0, 0)
        took = run.sharded() if options.shards_weights else run.replicated(memo)
        return Rank(
            rank=rank,
            weights=_bytes_of(_held(stages)),
            gradients=took.gradients,
            master=master,
            state=state,
            buckets=[bucket.grad_data.numel() for stage in stages for bucket in _buckets(stage)],
            chunks=[
                Chunk(layers=layer_indices(stage), parameters=count, work=work)
                for stage, count, work in zip(stages, parameters, took.works, strict=True)
            ],
            placements=placements,
            buffers=sum(_saved_buffers(stage) for stage in stages),
            whole=took.whole,
            traffic=took.traffic,
            layers=layers_of(stages),
        )


class _Took(NamedTuple):
    """What a microbatch took in each chunk; collectives of a step; bytes of gradients, and of what was made whole."""

    works: list[Work]
    traffic: Traffic
    gradients: int
    whole: int


class _Run(NamedTuple):
    """The stages of a rank, to be run."""

    stages: list[MegatronModule]
    builder: DistributedModelBuilder[MegatronModule, ModelConfig]
    groups: ProcessGroupCollection
    layout: Layout
    batch: Batch
    passed: Passed

    def replicated(self, memo: Memo) -> _Took:
        """Run a microbatch through each chunk of which it is not known what it takes, and the end of a step."""
        names = _names(self.groups)
        works = self._works(memo)
        ending, more = _Collectives(names), Calls.none()
        for work in works:
            more.add(work.calls)
        if isinstance(self.stages[0], DistributedDataParallel):
            with ending:
                finalize_model_grads(list(self.stages))
                for stage in self.stages:
                    if isinstance(stage, DistributedDataParallel) and stage.ddp_config.use_distributed_optimizer:
                        stage.start_param_sync(force_sync=True)
        traffic = Traffic(microbatches=0, first=ending.calls, more=more)
        return _Took(works, traffic, _gradient_bytes(self.stages), 0)

    def sharded(self) -> _Took:
        """Run whole steps: what is gathered when depends on what was before."""
        fewest, round_size = self._fewest_microbatches()
        wanted = self.batch.microbatches(self.layout, group_size=self._group_size())
        with (
            WholeMemory(self.stages, [self.groups.dp_cp, self.groups.expt_dp]) as memory,
            optimizer_of(self.stages, use_gloo_process_groups=False) as optimizer,
        ):
            start_gathering(self.stages)  # as the step before has done
            works = self._works({})  # nothing is known: what is gathered depends on the chunks before
            gradients, first = self._ended()
            for work in works:
                first.add(work.calls)
            if self.layout.pp > 1:  # by the order of a pipeline's passes
                first = self._step(min(wanted, fewest), optimizer, works)
            more = self._step(fewest + round_size, optimizer, works).less(first) if wanted > fewest else Calls.none()
        traffic = Traffic(microbatches=min(wanted, fewest), first=first, round_size=round_size, more=more)
        return _Took(works, traffic, gradients, memory.peak)

    def _fewest_microbatches(self) -> tuple[int, int]:
        """Of a step after which each round more takes the same: the pipeline is full; and the size of a round."""
        pp, vp, group = self.layout.pp, self.layout.vp, self._group_size()
        return (1, 1) if pp == 1 else (pp, 1) if vp == 1 else (2 * group, group)

    def _group_size(self) -> int:
        """How many microbatches in a row a virtual stage computes."""
        return self.builder.transformer_config.microbatch_group_size_per_vp_stage or self.layout.pp

    def _ended(self) -> tuple[int, Calls]:
        """End a step but for the optimizer's computation; return the bytes of its gradients, and what it sends."""
        sent = _Collectives(_names(self.groups))
        with sent:
            finalize_model_grads(list(self.stages))
            gradients = _bytes_of(gradient for stage in self.stages for gradient in sharded_gradients(stage))
            start_gathering(self.stages)
        return gradients, sent.calls

    def _step(self, microbatches: int, optimizer: Any, works: Sequence[Work]) -> Calls:
        """Run a step but for the optimizer's computation."""
        shape = (microbatches, self.batch.micro_batch_size, self.batch.seq_length + 1)
        samples = torch.empty(shape, dtype=torch.long)
        sent = _Collectives(_names(self.groups))
        with sent, _fused_attention(), replaced(self._shapes_told(microbatches, works)):
            zero_gradients(self.stages)
            optimizer.zero_grad()
            run_microbatches(self.stages, self.groups, self.layout, samples, forward_step=self.builder.forward_step)
            start_gathering(self.stages)
        return sent.calls

    def _shapes_told(self, microbatches: int, works: Sequence[Work]) -> Replacement:
        """What ranks of a pipeline would tell each other of shapes, by the order of their passes: here nothing arrives.

        Megatron asks for ``variable_seq_lengths``, and for predictions of several tokens on a stage of their own.
        """
        group_size = self.builder.transformer_config.microbatch_group_size_per_vp_stage
        order = passes(self.layout, self.groups.pp.rank(), microbatches, group_size=group_size)
        received = (works[one.chunk].received for one in order if one.forward)
        passed_on = (works[one.chunk].passed_on for one in order if not one.forward)
        inputs, gradients = ((message.shape for message in side if message) for side in (received, passed_on))

        def told(
            _: object, send_next: object, send_prev: object, recv_prev: bool, recv_next: bool
        ) -> tuple[torch.Size | None, torch.Size | None]:
            return next(inputs) if recv_prev else None, next(gradients) if recv_next else None

        return Replacement(P2PCommunicator, "_communicate_shapes", told)

    def _works(self, memo: Memo) -> list[Work]:
        """Run a microbatch through each chunk not known from ``memo``, with what the stage before passes on."""
        works = []
        for index, stage in enumerate(self.stages):
            place = index * self.layout.pp + self.groups.pp.rank()
            work = self._remembered(stage, self.passed.get(place - 1) or self._hidden_states(), memo)
            if work.passed_on:
                self.passed[place] = work.passed_on.shape
            works.append(work)
        return works

    def _hidden_states(self) -> torch.Size:
        """The shape of what a stage of a decoder passes on, of this rank's part of the sequence."""
        config = self.builder.transformer_config
        length = self.batch.seq_length // self.groups.cp.size()
        if config.sequence_parallel:
            length //= self.groups.tp.size()
        return torch.Size((length, self.batch.micro_batch_size, config.hidden_size))

    def _remembered(self, stage: MegatronModule, arriving: torch.Size, memo: Memo) -> Work:
        sizes = {kind: group.size() for kind, group in _groups(self.groups)}
        chunk = (_signature(unwrapped(stage)), arriving, self.batch.micro_batch_size, self.batch.seq_length)
        within = (chunk, *(sizes.get(kind) for kind in _WITHIN_LAYERS))
        anywhere = (chunk, *sizes.items())
        work = memo.get(within) or memo.get(anywhere)
        if work is None:
            work = self._work(stage, arriving)
            # Sizes of the pipeline and of data parallelism matter only to layers that talk to those ranks.
            talks_within = {group for group, _, _ in work.calls.size} <= set(_WITHIN_LAYERS)
            memo[within if talks_within else anywhere] = work
        return work

    def _work(self, stage: MegatronModule, arriving: torch.Size) -> Work:
        """Run one microbatch through a chunk, forward and backward; its input, if it takes one, has a shape."""
        model: Any = unwrapped(stage)
        received = passed_on = None
        kept, sent = _Kept(stage), _Collectives(_names(self.groups))
        flops = FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOPS)
        with kept, flops, sent, _fused_attention():
            if not getattr(model, "pre_process", True):
                dtype = self.builder.transformer_config.pipeline_dtype
                from_before = torch.empty(arriving, dtype=dtype, requires_grad=True)
                received = Message.of(from_before)
                model.set_input_tensor(from_before)
            tokens = torch.empty(self.batch.micro_batch_size, self.batch.seq_length + 1, dtype=torch.long)
            output = self.builder.forward_step(stage, tokens, self.groups)
            forward_flops, bytes_kept = flops.get_total_flops(), kept.total()
            if getattr(model, "post_process", True):
                output.float().mean().backward()
            else:
                passed_on = Message.of(output)
                output.backward(torch.empty_like(output))
        return Work(
            kept=bytes_kept,
            forward_flops=forward_flops,
            flops=flops.get_total_flops(),
            calls=sent.calls,
            received=received,
            passed_on=passed_on,
        )


def _held(stages: Sequence[MegatronModule]) -> Iterator[torch.Tensor]:
    for stage in stages:
        yield from weights(stage)
        yield from (local(buffer) for buffer in unwrapped(stage).buffers())


def _saved_buffers(stage: MegatronModule) -> int:
    model = unwrapped(stage)
    saved = model.state_dict()
    return sum(buffer.numel() for name, buffer in model.named_buffers() if name in saved)


def _bytes_of(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes of the memory behind tensors, each piece once: a view holds all of what it is a view of."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _buckets(stage: MegatronModule) -> list[Any]:
    if not isinstance(stage, DistributedDataParallel):
        return []
    buffers: list[Any] = vars(stage)["buffers"] + stage.expert_parallel_buffers  # not the method of a module
    return [bucket for buffer in buffers for bucket in buffer.buckets]


def _gradient_bytes(stages: Sequence[MegatronModule]) -> int:
    buffered = _bytes_of(bucket.grad_data for stage in stages for bucket in _buckets(stage))
    if buffered:
        return buffered
    parameters = [local(parameter) for stage in stages for parameter in stage.parameters() if parameter.requires_grad]
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _optimizer_bytes(stages: Sequence[MegatronModule]) -> tuple[int, int]:
    """Bytes of Megatron's optimizer: copies of the weights in full precision, and Adam's two means of each element."""
    held = {tensor.untyped_storage()._cdata for tensor in _held(stages)}
    with optimizer_of(list(stages), use_gloo_process_groups=False) as optimizer:
        updated = [
            local(parameter)
            for one in getattr(optimizer, "chained_optimizers", [optimizer])
            for group in one.param_groups
            for parameter in group["params"]
        ]
    copies = (tensor for tensor in updated if tensor.untyped_storage()._cdata not in held)
    return _bytes_of(copies), sum(2 * tensor.numel() * tensor.element_size() for tensor in updated)


def _alike() -> AbstractContextManager[None]:
    """While Megatron's optimizer asks every rank of the world for its kinds of parameters: they say what this one does.

    With ten thousand ranks that would take most of the time of a plan.
    """

    def answer(answers: list[Any], mine: Any, group: ProcessGroup | None = None) -> None:
        answers[:] = [mine] * len(answers)

    return replaced(Replacement(torch.distributed, "all_gather_object", answer))


def _signature(model: torch.nn.Module) -> Any:
    """What two chunks have in common that take the same: their modules, but for the layers' numbers."""
    shapes = tuple(
        (re.sub(r"\.\d+\.", ".", name), parameter.shape, parameter.dtype)
        for name, parameter in model.named_parameters()
    )
    return (repr(model), shapes, getattr(model, "pre_process", None), getattr(model, "post_process", None))


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the memory that autograd keeps, beyond parameters, buffers and gradients; each piece once."""

    def __init__(self, stage: MegatronModule) -> None:
        self._stage = stage
        self._pieces: dict[int, torch.UntypedStorage] = {}
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        piece = tensor.untyped_storage()
        self._pieces[piece._cdata] = piece  # which also keeps its address from being used again
        return tensor

    def total(self) -> int:
        """Return the bytes kept so far; whole weights that a wrapper has not freed yet are parameters."""
        others = (*_held([self._stage]), *(local(parameter) for parameter in self._stage.parameters()))
        cdata = {tensor.untyped_storage()._cdata for tensor in others}
        return sum(piece.nbytes() for piece in self._pieces.values() if piece._cdata not in cdata)


_MESSAGES = ("send", "recv")
"""Between two ranks of a pipeline, which are counted by what their passes take and give."""
_FUNCTIONAL = {
    "all_gather_into_tensor": "allgather",
    "all_reduce": "allreduce",
    "all_to_all_single": "alltoall",
    "reduce_scatter_tensor": "reduce_scatter",
}
"""Collectives that return a new tensor, and what those that fill one are called."""


class _Collectives(TorchDispatchMode):
    """Counts collectives: each by its group and operation, and the bytes of its larger side."""

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = Calls.none()
        self._names = names

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        operation = func._schema.name.partition("::")[2]
        if func.namespace == "c10d":
            group = next(ProcessGroup.unbox(argument) for argument in args if is_group(argument))
            self._count(group, operation.strip("_").removesuffix("_base"), args)
        elif func.namespace == "_c10d_functional" and operation in _FUNCTIONAL:  # those of DTensor
            name: Any = next(argument for argument in reversed(args) if isinstance(argument, str))
            group = vars(distributed_c10d)["_resolve_process_group"](name)
            self._count(group, _FUNCTIONAL[operation], (*args, result))
        return result

    def _count(self, group: ProcessGroup, operation: str, arguments: tuple[Any, ...]) -> None:
        if group.size() > 1 and operation not in _MESSAGES:
            key = (self._names.get(group.group_name, "other"), group.size(), operation)
            self.calls.number[key] += 1
            self.calls.size[key] += max(map(_tensor_bytes, arguments))


def _tensor_bytes(argument: object) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_tensor_bytes, argument)) if isinstance(argument, list | tuple) else 0


def _groups(groups: ProcessGroupCollection) -> list[tuple[str, ProcessGroup]]:
    kinds = ("tp", "cp", "ep", "pp", "dp", "dp_cp", "expt_tp", "expt_dp", "tp_ep", "tp_cp", "embd", "pos_embd", "mp")
    there = [(kind, getattr(groups, kind, None)) for kind in kinds]
    return [(kind, group) for kind, group in there if group is not None]


def _names(groups: ProcessGroupCollection) -> dict[str, str]:
    """What groups are called; ranks that are one group for several kinds of parallelism count as the first."""
    return {group.group_name: kind for kind, group in reversed(_groups(groups))}


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,  # the kernels see it in the shapes
) -> torch.Tensor:
    """Attention by kernels that keep queries, keys, values, the output and one number for each of its rows.

    On the meta device torch would compute, and keep, the whole matrix of scores. Where it has no such kernel on a CPU
    (for values of another width than queries, or a mask with a gradient) that of GPUs is taken.
    """
    mask = attn_mask
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    if query.shape[-1] == value.shape[-1] and not (mask is not None and mask.requires_grad):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]  # type: ignore[no-any-return]
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, mask, True, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]


def _fused_attention() -> AbstractContextManager[None]:
    """Attention by `_attention`, in recomputed passes too: torch switches function modes off in the backward pass."""
    return replaced(Replacement(torch.nn.functional, "scaled_dot_product_attention", _attention))


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    """FLOPs of the scores, and of their product with the values."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward_flops(
    _: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *__: object, **___: object
) -> int:
    """FLOPs of the scores again, and of two gradients for each of the two products."""
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


_ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten._scaled_dot_product_efficient_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward: _attention_backward_flops,
}
"""torch 2.15 has formulas for all four; 2.11 counts nothing for the first two, and refuses grouped queries."""
