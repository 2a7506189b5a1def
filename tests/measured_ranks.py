"""Measure memory, parameters and collectives of real ranks, to compare with plans; importable by ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bridge.config import Document, ModelConfig, register
from bridge.dist.document_layout import replace_layout
from bridge.dist.job import BuildJob, make_builder
from bridge.dist.train.batch import Batch
from bridge.dist.wrapper import ShardingStrategy, Wrapper

RECORDED: list[tuple[str, tuple[int, ...], str]] = []


def record_parameters(stages: list[Any]) -> list[Any]:
    """Record this rank's part of each parameter and its dtype: a post-wrap hook for real ranks and plans."""
    for stage in stages:
        for name, parameter in stage.named_parameters():
            mine = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            RECORDED.append((name, tuple(mine.shape), str(mine.dtype)))
    return stages


register(record_parameters, "measured_ranks.record_parameters")


def pop_recorded_parameters() -> list[tuple[str, tuple[int, ...], str]]:
    found = list(RECORDED)
    assert found
    RECORDED.clear()
    return found


WORLD = 4
BATCH = Batch(seq_length=32, micro_batch_size=2, global_batch_size=16)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A preset, its layout on four ranks, and how it is wrapped."""

    preset: str
    sizes: dict[str, int] = field(default_factory=dict)
    sequence_parallel: bool = False
    overrides: tuple[str, ...] = ()
    wrapper: Wrapper = Wrapper.DDP
    distributed_optimizer: bool = False
    sharding_strategy: ShardingStrategy | None = None
    keeps_alike: bool = True
    """Whether a CPU saves the same bytes for the backward pass as a GPU, for any routing of tokens."""

    @property
    def recomputes(self) -> bool:
        return any("recompute_granularity" in override for override in self.overrides)

    def job(self) -> BuildJob:
        document = Document.load(self.preset, [*self.overrides, "post_wrap_hooks=[measured_ranks.record_parameters]"])
        replace_layout(document, self.sizes, sequence_parallel=self.sequence_parallel)
        return BuildJob(
            document=document.data,
            wrapper=self.wrapper,
            distributed_optimizer=self.distributed_optimizer,
            sharding_strategy=self.sharding_strategy,
        )


class Measured(NamedTuple):
    """Parameters of a rank, bytes by kind, elements of each bucket, and bytes saved by each chunk.

    ``recomputed`` is how far what is saved grows in the backward pass, by chunk without the loss.
    """

    parameters: list[tuple[str, tuple[int, ...], str]]
    weights: int
    gradients: int
    master: int
    state: int
    buckets: list[int]
    kept: list[int] | None
    recomputed: list[int]


def measure_ranks(cases: dict[str, Case]) -> dict[str, Measured]:
    """Build and wrap each case on this rank, and run a microbatch through each chunk."""
    import weakref

    import torch
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.utils import unwrap_model
    from torch.distributed.tensor import DTensor

    from bridge.dist import create_process_groups, destroy_process_groups
    from bridge.dist.train.optimizer import set_up_optimizer

    def local(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def storages(tensors: Any) -> dict[int, int]:
        found = {}
        for tensor in tensors:
            storage = local(tensor).untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
        return found

    def measure_case(case: Case) -> Measured:
        job = case.job()
        config = ModelConfig.from_dict(job.document)
        groups = create_process_groups(job.check(config, WORLD))
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        builder = make_builder(config)
        options = job.make_options(builder.transformer_config)
        stages: list[Any] = builder.build_distributed_models(
            groups, ddp_config=options.ddp_config, wrap_with_ddp=options.wrap_with_ddp
        )
        models: list[Any] = [unwrap_model(stage) for stage in stages]
        weights = storages([t for model in models for t in (*model.parameters(), *model.buffers())])
        buckets: list[Any] = [
            bucket
            for stage in stages
            if isinstance(stage, DistributedDataParallel)
            for buffer in [*vars(stage)["buffers"], *stage.expert_parallel_buffers]
            for bucket in buffer.buckets
        ]
        gradients = [bucket.grad_data for bucket in buckets] or [p for model in models for p in model.parameters()]
        updated = optimized_parameters(stages) if options.wrap_with_ddp else []
        saved = [
            run(stage, model, builder, groups, with_backward=case.recomputes and not model.post_process)
            for stage, model in zip(stages, models, strict=True)
        ]
        return Measured(
            parameters=pop_recorded_parameters(),
            weights=sum(weights.values()),
            gradients=sum(storages(gradients).values()),
            master=sum(size for at, size in storages(updated).items() if at not in weights),
            state=sum(2 * 4 * tensor.numel() for tensor in updated),
            buckets=[bucket.grad_data.numel() for bucket in buckets],
            kept=[kept for kept, _ in saved] if case.keeps_alike else None,
            recomputed=[more for _, more in saved if more is not None],
        )

    def optimized_parameters(stages: list[Any]) -> list[torch.Tensor]:
        with set_up_optimizer(stages) as optimizer:
            parts = getattr(optimizer, "chained_optimizers", [optimizer])
            return [local(p) for part in parts for group in part.param_groups for p in group["params"]]

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    def run(stage: Any, model: Any, builder: Any, groups: Any, *, with_backward: bool) -> tuple[int, int | None]:
        config = builder.transformer_config
        others = storages([*model.parameters(), *model.buffers()])
        existing: weakref.WeakSet[Saved] = weakref.WeakSet()
        backward: list[int] = []

        def count() -> int:
            return sum(size for at, size in storages(one.tensor for one in existing).items() if at not in others)

        def save(tensor: torch.Tensor) -> Saved:
            existing.add(saved := Saved(tensor))
            if kept is not None:
                backward.append(count())
            return saved

        if not model.pre_process:
            length = BATCH.seq_length // groups.cp.size() // (groups.tp.size() if config.sequence_parallel else 1)
            shape = (length, BATCH.micro_batch_size, config.hidden_size)
            model.set_input_tensor(torch.randn(shape, dtype=config.pipeline_dtype).requires_grad_())
        tokens = torch.arange(BATCH.micro_batch_size * (BATCH.seq_length + 1)).view(BATCH.micro_batch_size, -1) % 256
        kept = None
        with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved.tensor):
            output = builder.forward_step(stage, tokens, groups)
            kept = count()
            if with_backward:
                output.backward(torch.ones_like(output))
        return kept, max(backward) - kept if with_backward else None

    found = {}
    for name, case in cases.items():
        found[name] = measure_case(case)
        destroy_process_groups()
    return found


class MeasuredSharded(NamedTuple):
    """Parameters of a rank of a sharded model, bytes by kind, and its collectives in a step."""

    parameters: list[tuple[str, tuple[int, ...], str]]
    weights: int
    gradients: int
    master: int
    state: int
    whole: int
    collectives: dict[tuple[str, str], tuple[int, int]]
    """Calls and bytes, by group and operation."""


def train_sharded(cases: dict[str, Case]) -> dict[str, MeasuredSharded]:
    """Build, wrap and train each case for two steps on this rank; measure the second step."""
    import weakref
    from contextlib import ExitStack
    from unittest.mock import patch

    import torch
    from megatron.core.distributed import FullyShardedDataParallel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.utils import unwrap_model
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode

    from bridge.dist import create_process_groups, destroy_process_groups
    from bridge.dist.train.optimizer import set_up_optimizer
    from bridge.dist.train.step import run_microbatches, zero_gradients

    def local(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def memory(tensors: Any) -> dict[int, int]:
        pieces = [local(tensor).untyped_storage() for tensor in tensors]
        return {piece.data_ptr(): piece.nbytes() for piece in pieces if piece.nbytes()}

    def parameter_groups(stages: list[Any]) -> list[Any]:
        wrapped = [stage for stage in stages if isinstance(stage, FullyShardedDataParallel)]
        return [group for stage in wrapped for group in stage.param_and_grad_buffer.parameter_groups]

    def weight_tensors(stages: list[Any]) -> list[torch.Tensor]:
        groups = parameter_groups(stages)
        if groups and groups[0].model_weight_buffer is None:
            return [parameter for group in groups for parameter in group.params]
        return [group.model_weight_buffer.data for group in groups] or [p for s in stages for p in s.parameters()]

    def measure_case(case: Case) -> MeasuredSharded:
        job = case.job()
        config = ModelConfig.from_dict(job.document)
        layout = job.check(config, WORLD)
        groups = create_process_groups(layout)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        builder = make_builder(config)
        options = job.make_options(builder.transformer_config)
        stages: list[Any] = builder.build_distributed_models(
            groups,
            ddp_config=options.ddp_config,
            use_megatron_fsdp=options.use_megatron_fsdp,
            use_torch_fsdp2=options.use_torch_fsdp2,
        )
        of_data = {"dp_cp": groups.dp_cp, "expt_dp": groups.expt_dp}
        seen = CollectiveRecorder(stages, of_data, case.sharding_strategy)
        shape = (BATCH.count_microbatches(layout), BATCH.micro_batch_size, BATCH.seq_length + 1)
        with set_up_optimizer(stages) as optimizer:
            parts = getattr(optimizer, "chained_optimizers", [optimizer])
            updated = [local(p) for part in parts for group in part.param_groups for p in group["params"]]
            for step in range(2):
                samples = torch.randint(256, shape)
                with seen.watching() if step == 1 else ExitStack():
                    zero_gradients(stages)
                    optimizer.zero_grad()
                    run_microbatches(stages, groups, layout, samples, forward_step=builder.forward_step)
                    gradients = memory(group.main_grad_buffer.data for group in parameter_groups(stages))
                    gradients |= memory(p.grad for stage in stages for p in stage.parameters() if p.grad is not None)
                    if step == 0:
                        weights = memory(weight_tensors(stages))
                    optimizer.step()
            state = [
                local(moment)
                for part in parts
                for values in part.optimizer.state.values()
                for name, moment in values.items()
                if name.startswith("exp_avg")
            ]
        kept = memory(buffer for stage in stages for buffer in unwrap_model(stage).buffers())
        return MeasuredSharded(
            parameters=pop_recorded_parameters(),
            weights=sum((weights | kept).values()),
            gradients=sum(gradients.values()),
            master=sum(size for at, size in memory(updated).items() if at not in weights),
            state=sum(moment.numel() * moment.element_size() for moment in state),
            whole=seen.most,
            collectives=seen.collectives,
        )

    class CollectiveRecorder:
        """A recorder of the collectives of some groups and of the memory that the wrapper's objects hold."""

        def __init__(self, stages: list[Any], groups: dict[str, Any], strategy: ShardingStrategy | None) -> None:
            self.most = 0
            self._operations = {"all_gather_": "allgather", "reduce_scatter_": "reduce_scatter"}
            if strategy is ShardingStrategy.NO_SHARD:
                self._operations["all_reduce"] = "allreduce"
            self.collectives: dict[tuple[str, str], tuple[int, int]] = {}
            self._groups = groups
            both = [(group.model_weight_buffer, group.main_grad_buffer) for group in parameter_groups(stages)]
            self._buffers = [buffer for buffers in both for buffer in buffers if buffer is not None]
            states = [m._get_fsdp_state() for s in stages for m in s.modules() if isinstance(m, FSDPModule)]
            sharded = [g for s in states for g in getattr(s, "_fsdp_param_groups", None) or [s._fsdp_param_group] if g]
            self._parameters = [parameter for group in sharded for parameter in group.fsdp_params]
            self._flat: list[weakref.ref[torch.Tensor]] = []
            self._depth = 0

        def watching(self) -> ExitStack:
            stack = ExitStack()
            for name in dir(torch.distributed):
                known = [value for start, value in self._operations.items() if name.startswith(start)]
                if known and name.endswith(("tensor", "single", "all_reduce")):
                    stack.enter_context(patch.object(torch.distributed, name, self._collective(name, known[0])))
            stack.enter_context(DTensorRecorder(self))
            for name in ("foreach_all_gather_copy_out", "foreach_reduce"):
                stack.enter_context(patch.object(_fsdp_param_group, name, self._copy(name)))
            return stack

        def _collective(self, name: str, operation: str) -> Any:
            original = getattr(torch.distributed, name)

            def recorded(*args: Any, **kwargs: Any) -> Any:
                self._depth += 1
                try:
                    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
                    largest = max(tensors, key=lambda tensor: tensor.numel())
                    if self._depth == 1 and largest.numel() > 1:  # otherwise it is the gradient norm
                        self._collect(operation, kwargs.get("group"), largest)
                    return original(*args, **kwargs)
                finally:
                    self._depth -= 1

            return recorded

        def _collect(self, operation: str, group: Any, whole: torch.Tensor) -> None:
            for kind, known in self._groups.items():
                if group is known:
                    self._flat.append(weakref.ref(whole))
                    self._look()
                    self.count(kind, operation, whole.numel() * whole.element_size())

        def count(self, kind: str, operation: str, more: int) -> None:
            calls, size = self.collectives.get((kind, operation), (0, 0))
            self.collectives[kind, operation] = calls + 1, size + more

        def _copy(self, name: str) -> Any:
            original = getattr(_fsdp_param_group, name)

            def recorded(*args: Any, **kwargs: Any) -> Any:
                gradients = list(args[1]) if name == "foreach_reduce" else []
                result = original(*args, **kwargs)
                if name == "foreach_reduce":
                    self._look([*gradients, result[0]])
                else:
                    self._look()
                return result

            return recorded

        def _look(self, more: Any = ()) -> None:
            self._flat = [reference for reference in self._flat if reference() is not None]
            found = memory([tensor for reference in self._flat if (tensor := reference()) is not None])
            found |= memory(more)
            for buffer in self._buffers:
                found |= memory(bucket.data for bucket in buffer.temporary_bucket_allocator.buckets.values())
            for parameter in self._parameters:
                found |= memory(parameter.all_gather_outputs)
                whole = getattr(parameter, "_unsharded_param", None)
                if whole is not None and whole.grad is not None:
                    found |= memory([whole.grad])
            held = memory(buffer.data for buffer in self._buffers)  # they may be gathered and reduced in place
            self.most = max(self.most, sum(size for at, size in found.items() if at not in held))

    class DTensorRecorder(TorchDispatchMode):
        """A recorder of the all-gathers and scatters of DTensors, over all data-parallel ranks."""

        def __init__(self, seen: CollectiveRecorder) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self._seen = seen

        def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **kwargs or {})
            name = func._schema.name
            if name.startswith("_c10d_functional::all_gather"):
                self._seen.count("dp_cp", "allgather", result.numel() * result.element_size())
            elif name == "c10d::scatter_":
                parts = args[1][0] if args[1] else args[0]
                self._seen.count("dp_cp", "scatter", sum(part.numel() * part.element_size() for part in parts))
            return result

    found = {}
    for name, case in cases.items():
        found[name] = measure_case(case)
        destroy_process_groups()
    return found
