"""A plan is what real processes hold: rank by rank, for models of every family."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from megatron.core import parallel_state
from ranks import run_ranks

from bridge.config import BridgeError, Document, ModelConfig, register
from bridge.dist.documents import apply_layout, replace_layout
from bridge.dist.errors import PlanError
from bridge.dist.job import BuildJob, make_builder, vocab_size
from bridge.dist.layout import Layout
from bridge.dist.plan.count.rank import measure
from bridge.dist.plan.forecast.machine import Machine
from bridge.dist.plan.forecast.ranking import Candidate
from bridge.dist.plan.forecast.search import search
from bridge.dist.plan.plan import PlanOptions, plan
from bridge.dist.plan.results import Plan
from bridge.dist.plan.virtual_rank.groups import as_rank
from bridge.dist.train.batch import Batch
from bridge.dist.train.flops import model_flops
from bridge.dist.wrapper import Wrapper

NOTED: list[tuple[str, tuple[int, ...], str]] = []


def note(stages: list[Any]) -> list[Any]:
    """A hook after wrapping, of real ranks and of plans: this rank's part of each parameter, and its precision."""
    for stage in stages:
        for name, parameter in stage.named_parameters():
            mine = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            NOTED.append((name, tuple(mine.shape), str(mine.dtype)))
    return stages


register(note, "test_plan.note")


def noted() -> list[tuple[str, tuple[int, ...], str]]:
    found = list(NOTED)
    assert found
    NOTED.clear()
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
    keeps_alike: bool = True
    """Whether a CPU keeps for the backward pass what a GPU does, wherever tokens are routed to."""

    def job(self) -> BuildJob:
        document = Document.load(self.preset, [*self.overrides, "post_wrap_hooks=[test_plan.note]"])
        replace_layout(document, self.sizes, sequence_parallel=self.sequence_parallel)
        return BuildJob(document=document.data, wrapper=self.wrapper, distributed_optimizer=self.distributed_optimizer)


HALF = ("transformer.bf16=true", "transformer.params_dtype=torch.bfloat16")
RECOMPUTED = (
    "transformer.recompute_granularity=full",
    "transformer.recompute_method=uniform",
    "transformer.recompute_num_layers=1",
)
CASES = {
    "dp": Case(preset="tiny", distributed_optimizer=True),
    "tp pp": Case(preset="tiny", sizes={"tp": 2, "pp": 2}),
    # The CPU's layer norm keeps its statistics in half precision, that of a GPU in full.
    "pp vp, half": Case(
        preset="tiny", sizes={"pp": 2, "vp": 2}, distributed_optimizer=True, overrides=HALF, keeps_alike=False
    ),
    "pp vp": Case(preset="tiny", sizes={"pp": 2, "vp": 2}, distributed_optimizer=True),
    "tp sp": Case(preset="tiny", sizes={"tp": 2}, sequence_parallel=True),
    "tp sp, recomputed": Case(preset="tiny", sizes={"tp": 2}, sequence_parallel=True, overrides=RECOMPUTED),
    "cp, rotary, grouped queries": Case(
        preset="tiny",
        sizes={"cp": 2},
        overrides=("position_embedding_type=rope", "transformer.num_query_groups=2"),
        distributed_optimizer=True,
    ),
    # On a CPU torch has no fused attention for values of another width than queries, nor for a bias with a gradient.
    "latent attention": Case(
        preset="mla-tiny", sizes={"tp": 2}, sequence_parallel=True, distributed_optimizer=True, keeps_alike=False
    ),
    "encoder and decoder": Case(preset="t5-tiny", sizes={"tp": 2}, distributed_optimizer=True, keeps_alike=False),
    "encoder and decoder, rotary": Case(
        preset="t5-tiny", sizes={"tp": 2}, overrides=("position_embedding_type=rope",), distributed_optimizer=True
    ),
    "experts": Case(
        preset="moe-tiny",
        sizes={"tp": 2, "ep": 2},
        sequence_parallel=True,
        distributed_optimizer=True,
        overrides=HALF,
        keeps_alike=False,
    ),
    "mamba, half": Case(preset="mamba-tiny", sizes={"tp": 2, "pp": 2}, overrides=HALF),
    "no wrapper": Case(preset="tiny", sizes={"tp": 2}, wrapper=Wrapper.NONE),
}


class Held(NamedTuple):
    """What a rank holds: parameters by name, bytes, elements of each bucket, bytes kept by each chunk."""

    parameters: list[tuple[str, tuple[int, ...], str]]
    weights: int
    gradients: int
    master: int
    state: int
    buckets: list[int]
    kept: list[int] | None


def held(cases: dict[str, Case]) -> dict[str, Held]:
    """On each real rank: build, wrap, and run a microbatch through each chunk."""
    import torch
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.utils import unwrap_model
    from torch.distributed.tensor import DTensor

    from bridge.dist import create_process_groups, destroy_process_groups
    from bridge.dist.train.optimizer import optimizer_of

    def local(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def storages(tensors: Any) -> dict[int, int]:
        found = {}
        for tensor in tensors:
            storage = local(tensor).untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
        return found

    def one(case: Case) -> Held:
        job = case.job()
        config = ModelConfig.from_dict(job.document)
        groups = create_process_groups(job.check(config, WORLD))
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        builder = make_builder(config)
        options = job.options(builder.transformer_config)
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
        updated = optimized(stages) if options.wrap_with_ddp else []
        kept = [forward(stage, model, builder, groups) for stage, model in zip(stages, models, strict=True)]
        return Held(
            parameters=noted(),
            weights=sum(weights.values()),
            gradients=sum(storages(gradients).values()),
            master=sum(size for at, size in storages(updated).items() if at not in weights),
            state=sum(2 * 4 * tensor.numel() for tensor in updated),
            buckets=[bucket.grad_data.numel() for bucket in buckets],
            kept=None if not case.keeps_alike else kept,
        )

    def optimized(stages: list[Any]) -> list[torch.Tensor]:
        with optimizer_of(stages) as optimizer:
            parts = getattr(optimizer, "chained_optimizers", [optimizer])
            return [local(p) for part in parts for group in part.param_groups for p in group["params"]]

    def forward(stage: Any, model: Any, builder: Any, groups: Any) -> int:
        config = builder.transformer_config
        others = storages([*model.parameters(), *model.buffers()])
        pieces: dict[int, Any] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in others:
                pieces[storage.data_ptr()] = storage
            return tensor

        if not model.pre_process:
            length = BATCH.seq_length // groups.cp.size() // (groups.tp.size() if config.sequence_parallel else 1)
            shape = (length, BATCH.micro_batch_size, config.hidden_size)
            model.set_input_tensor(torch.randn(shape, dtype=config.pipeline_dtype).requires_grad_())
        tokens = torch.arange(BATCH.micro_batch_size * (BATCH.seq_length + 1)).view(BATCH.micro_batch_size, -1) % 256
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            builder.forward_step(stage, tokens, groups)
        return sum(storage.nbytes() for storage in pieces.values())

    found = {}
    for name, case in cases.items():
        found[name] = one(case)
        destroy_process_groups()
    return found


@pytest.fixture(scope="module")
def real() -> list[dict[str, Held]]:
    return run_ranks(held, WORLD, CASES, timeout=240)


@pytest.mark.parametrize("name", CASES)
def test_the_plan_of_every_rank_is_what_it_holds(name: str, real: list[dict[str, Held]]) -> None:
    case = CASES[name]
    job = case.job()
    layout = job.check(ModelConfig.from_dict(job.document), WORLD)
    for rank in range(WORLD):
        planned = measure(job, layout, BATCH, rank=rank, memo={})
        assert (
            Held(
                parameters=noted(),
                weights=planned.weights,
                gradients=planned.gradients,
                master=planned.master,
                state=planned.state,
                buckets=planned.buckets,
                kept=None if not case.keeps_alike else [chunk.work.kept for chunk in planned.chunks],
            )
            == real[rank][name]
        )


# --- Wrappers that shard weights


LONGER = replace(BATCH, global_batch_size=32)
SHARDED = {
    f"{wrapper}, {name}": Case(
        preset=preset, sizes=sizes, sequence_parallel="tp" in sizes, overrides=overrides, wrapper=wrapper
    )
    for wrapper, preset, name, sizes, overrides in (
        (Wrapper.MEGATRON_FSDP, "tiny", "dp, half", {}, HALF),
        (Wrapper.MEGATRON_FSDP, "tiny", "tp, recomputed", {"tp": 2}, RECOMPUTED),
        (Wrapper.MEGATRON_FSDP, "moe-tiny", "experts", {"ep": 2}, ()),
        (Wrapper.MEGATRON_FSDP, "moe-tiny", "experts, half", {"ep": 2}, HALF),
        (Wrapper.TORCH_FSDP2, "tiny", "dp, half", {}, HALF),
        (Wrapper.TORCH_FSDP2, "tiny", "tp, recomputed", {"tp": 2}, RECOMPUTED),
        (Wrapper.TORCH_FSDP2, "tiny", "pp vp", {"pp": 2, "vp": 2}, ()),
        (Wrapper.TORCH_FSDP2, "moe-tiny", "experts", {}, HALF),
    )
}


class HeldInParts(NamedTuple):
    """What a rank holds of a model that is sharded, in bytes, and what it gathers and reduces in a step."""

    parameters: list[tuple[str, tuple[int, ...], str]]
    weights: int
    gradients: int
    master: int
    state: int
    whole: int
    collectives: dict[tuple[str, str], tuple[int, int]]
    """Calls and bytes, by group and operation."""


def trained_in_parts(cases: dict[str, Case]) -> dict[str, HeldInParts]:
    """On each real rank: build, wrap, and train two steps; what the second one takes."""
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
    from bridge.dist.train.optimizer import optimizer_of
    from bridge.dist.train.step import run_microbatches, zero_gradients

    def local(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def memory(tensors: Any) -> dict[int, int]:
        pieces = [local(tensor).untyped_storage() for tensor in tensors]
        return {piece.data_ptr(): piece.nbytes() for piece in pieces if piece.nbytes()}

    def buffers(stages: list[Any], name: str) -> list[torch.Tensor]:
        groups = [
            g
            for s in stages
            if isinstance(s, FullyShardedDataParallel)
            for g in s.param_and_grad_buffer.parameter_groups
        ]
        return [getattr(group, name).data for group in groups]

    def one(case: Case) -> HeldInParts:
        job = case.job()
        config = ModelConfig.from_dict(job.document)
        layout = job.check(config, WORLD)
        groups = create_process_groups(layout)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        builder = make_builder(config)
        options = job.options(builder.transformer_config)
        stages: list[Any] = builder.build_distributed_models(
            groups,
            ddp_config=options.ddp_config,
            use_megatron_fsdp=options.use_megatron_fsdp,
            use_torch_fsdp2=options.use_torch_fsdp2,
        )
        seen = Seen(stages, {"dp_cp": groups.dp_cp, "expt_dp": groups.expt_dp})
        shape = (LONGER.microbatches(layout), LONGER.micro_batch_size, LONGER.seq_length + 1)
        with optimizer_of(stages) as optimizer:
            parts = getattr(optimizer, "chained_optimizers", [optimizer])
            updated = [local(p) for part in parts for group in part.param_groups for p in group["params"]]
            for step in range(2):
                samples = torch.randint(256, shape)
                with seen.watching() if step == 1 else ExitStack():
                    zero_gradients(stages)
                    optimizer.zero_grad()
                    run_microbatches(stages, groups, layout, samples, forward_step=builder.forward_step)
                    gradients = memory(buffers(stages, "main_grad_buffer"))
                    gradients |= memory(p.grad for stage in stages for p in stage.parameters() if p.grad is not None)
                    if step == 0:
                        weights = memory(
                            buffers(stages, "model_weight_buffer") or [p for s in stages for p in s.parameters()]
                        )
                    optimizer.step()
            state = [
                local(moment)
                for part in parts
                for values in part.optimizer.state.values()
                for name, moment in values.items()
                if name.startswith("exp_avg")
            ]
        kept = memory(buffer for stage in stages for buffer in unwrap_model(stage).buffers())
        return HeldInParts(
            parameters=noted(),
            weights=sum((weights | kept).values()),
            gradients=sum(gradients.values()),
            master=sum(size for at, size in memory(updated).items() if at not in weights),
            state=sum(moment.numel() * moment.element_size() for moment in state),
            whole=seen.most,
            collectives=seen.collectives,
        )

    class Seen:
        """Collectives of some groups, by the functions that are called, and what the wrapper's own objects hold."""

        def __init__(self, stages: list[Any], groups: dict[str, Any]) -> None:
            self.most = 0
            self.collectives: dict[tuple[str, str], tuple[int, int]] = {}
            self._groups = groups
            self._buffers = [
                buffer
                for stage in stages
                if isinstance(stage, FullyShardedDataParallel)
                for group in stage.param_and_grad_buffer.parameter_groups
                for buffer in (group.model_weight_buffer, group.main_grad_buffer)
            ]
            states = [m._get_fsdp_state() for s in stages for m in s.modules() if isinstance(m, FSDPModule)]
            sharded = [g for s in states for g in getattr(s, "_fsdp_param_groups", None) or [s._fsdp_param_group] if g]
            self._parameters = [parameter for group in sharded for parameter in group.fsdp_params]
            self._flat: list[weakref.ref[torch.Tensor]] = []
            self._depth = 0

        def watching(self) -> ExitStack:
            stack = ExitStack()
            for name in dir(torch.distributed):
                operation = {"all_gather_": "allgather", "reduce_scatter_": "reduce_scatter"}
                known = [value for start, value in operation.items() if name.startswith(start)]
                if known and name.endswith(("tensor", "single")):
                    stack.enter_context(patch.object(torch.distributed, name, self._collective(name, known[0])))
            stack.enter_context(Scattered(self))
            for name in ("foreach_all_gather_copy_out", "foreach_reduce"):
                stack.enter_context(patch.object(_fsdp_param_group, name, self._copy(name)))
            return stack

        def _collective(self, name: str, operation: str) -> Any:
            original = getattr(torch.distributed, name)

            def called(*args: Any, **kwargs: Any) -> Any:
                self._depth += 1
                try:
                    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
                    if self._depth == 1:
                        self._collect(operation, kwargs["group"], max(tensors, key=lambda tensor: tensor.numel()))
                    return original(*args, **kwargs)
                finally:
                    self._depth -= 1

            return called

        def _collect(self, operation: str, group: Any, whole: torch.Tensor) -> None:
            for kind, one in self._groups.items():
                if group is one:
                    self._flat.append(weakref.ref(whole))
                    self._look()
                    self.count(kind, operation, whole.numel() * whole.element_size())

        def count(self, kind: str, operation: str, more: int) -> None:
            calls, size = self.collectives.get((kind, operation), (0, 0))
            self.collectives[kind, operation] = calls + 1, size + more

        def _copy(self, name: str) -> Any:
            original = getattr(_fsdp_param_group, name)

            def called(*args: Any, **kwargs: Any) -> Any:
                gradients = list(args[1]) if name == "foreach_reduce" else []
                result = original(*args, **kwargs)
                if name == "foreach_reduce":
                    self._look([*gradients, result[0]])
                else:
                    self._look()
                return result

            return called

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
            self.most = max(self.most, sum(found.values()))

    class Scattered(TorchDispatchMode):
        """What a DTensor gathers, and is scattered to make one: both over all data-parallel ranks."""

        def __init__(self, seen: Seen) -> None:
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
        found[name] = one(case)
        destroy_process_groups()
    return found


@pytest.fixture(scope="module")
def real_in_parts() -> list[dict[str, HeldInParts]]:
    return run_ranks(trained_in_parts, WORLD, SHARDED, timeout=240)


@pytest.mark.parametrize("name", SHARDED)
def test_the_plan_of_every_rank_is_what_it_holds_in_parts(
    name: str, real_in_parts: list[dict[str, HeldInParts]]
) -> None:
    job = SHARDED[name].job()
    layout = job.check(ModelConfig.from_dict(job.document), WORLD)
    for rank in (0, WORLD - 1):  # of each kind of parallelism the first and the last
        planned = measure(job, layout, LONGER, rank=rank, memo={})
        calls = planned.traffic.of(LONGER.microbatches(layout))
        assert (
            HeldInParts(
                parameters=noted(),
                weights=planned.weights,
                gradients=planned.gradients,
                master=planned.master,
                state=planned.state,
                whole=planned.whole,
                collectives={
                    (group, operation): (calls.number[group, ranks, operation], size)
                    for (group, ranks, operation), size in calls.size.items()
                    if group in ("dp_cp", "expt_dp") and operation != "allreduce"
                },
            )
            == real_in_parts[rank][name]
        )


@pytest.mark.parametrize(
    ("wrapper", "name", "error"),
    [
        (Wrapper.MEGATRON_FSDP, "_init_dist_index", NotImplementedError),
        (Wrapper.MEGATRON_FSDP, "_init_each_parameter_group_buffers", AssertionError),
        (Wrapper.TORCH_FSDP2, "_validate_no_meta_params", RuntimeError),
    ],
)
def test_wrappers_still_refuse_the_meta_device(
    wrapper: Wrapper, name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, megatron-core or torch has mended it: take the replacement out of ``bridge.dist.plan.virtual_rank.sharding``."""
    from bridge.dist.plan.virtual_rank import sharding

    kept = [replacement for replacement in sharded._replacements() if replacement.name != name]
    assert len(kept) == len(sharded._replacements()) - 1
    monkeypatch.setattr(sharded, "_replacements", lambda: kept)
    with pytest.raises(error):
        planned("tiny", {}, world_size=2, wrapper=wrapper)


@pytest.mark.parametrize("wrapper", [Wrapper.MEGATRON_FSDP, Wrapper.TORCH_FSDP2])
def test_llama_8b_in_parts(wrapper: Wrapper) -> None:
    """Two layers, so that it is quick; the rest of the model is in the embedding and the output layer."""
    found = planned("llama-3.1-8b", {}, "transformer.num_layers=2", world_size=64, wrapper=wrapper)
    (stage,) = found.stages
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    ends = 2 * 128_256 * 4096 + 4096
    assert found.parameters == 2 * layer + ends
    assert stage.weight_bytes == pytest.approx(2 * found.parameters / 64, rel=1e-3)  # half precision, and padding
    assert stage.optimizer_bytes == pytest.approx(12 * found.parameters / 64, rel=1e-3)
    # Both are whole at the end of the backward pass at least, in half precision.
    assert 2 * ends < stage.unsharded_bytes < 5 * found.parameters
    gathered = {traffic.operation: traffic for traffic in stage.traffic if traffic.group == "dp_cp"}
    # Gathered for the forward and for the backward pass, or ends once; reduced once. The batch is one microbatch.
    size = gathered["allgather"].bytes
    assert 2 * (2 * layer + ends) < size < 1.001 * 2 * 2 * found.parameters
    assert gathered["reduce_scatter"].bytes == pytest.approx(2 * found.parameters, rel=1e-3)
    assert stage.total_bytes == sum(
        (
            stage.weight_bytes,
            stage.gradient_bytes,
            stage.optimizer_bytes,
            stage.activation_bytes,
            stage.unsharded_bytes,
        )
    )


# --- Process groups


LAYOUTS = [
    Layout(tp=2, pp=2, vp=2, dp=2, etp=2),
    Layout(tp=2, cp=2, dp=2, etp=2),
    Layout(tp=2, ep=4, dp=4, etp=1),
    Layout(tp=1, pp=2, cp=2, ep=4, dp=4, etp=2),
    Layout(tp=4, pp=2, dp=2, ep=2, etp=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_are_those_that_megatron_makes(layout: Layout) -> None:
    """Every rank's groups, by their ranks, from Megatron's initialiser under torch's fake backend."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from bridge.dist import create_process_groups, destroy_process_groups

    for rank in range(layout.world_size):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
        create_process_groups(layout)
        expected = state()
        destroy_process_groups()
        torch.distributed.destroy_process_group()
        with as_rank(layout, rank):
            assert state() == expected


def state() -> dict[str, Any]:
    """What Megatron's global variables about groups say, but for groups of gloo, which a plan has none of."""
    import torch

    found: dict[str, Any] = {}
    for name, value in vars(parallel_state).items():
        if name.isupper() and "GLOO" not in name and ("GROUP" in name or "RANK" in name):
            if isinstance(value, torch.distributed.ProcessGroup):
                found[name] = (torch.distributed.get_process_group_ranks(value), value.rank(), value.size())
            elif value is None or isinstance(value, int | list):
                found[name] = value
    return found


# --- Whole jobs


def planned(preset: str, sizes: dict[str, int], *overrides: str, world_size: int, **options: Any) -> Plan:
    document = Document.load(preset, list(overrides))
    apply_layout(document, sizes)
    batch = options.pop("batch", Batch(seq_length=document.data["seq_length"], global_batch_size=world_size))
    return plan(document, PlanOptions(batch=batch, world_size=world_size, **options))


ENDS_ARE_LAYERS = (
    "transformer.account_for_embedding_in_pipeline_split=true",
    "transformer.account_for_loss_in_pipeline_split=true",
    "transformer.sequence_parallel=true",
)


def test_llama_405b_on_16384_gpus() -> None:
    found = planned(
        "llama-3.1-405b",
        {"tp": 8, "pp": 16, "vp": 8},
        *ENDS_ARE_LAYERS,
        world_size=16_384,
        distributed_optimizer=True,
    )
    assert found.parameters == 405_853_388_800  # as published
    assert [len(stage.chunks) for stage in found.stages] == [8] * 16
    stage = found.stages[1]
    # Eight layers over eight ranks; half precision, gradients in full, and what 128 ranks share of the optimizer's.
    attention, feed_forward = 16384 * (16384 + 2 * 1024) + 16384 * 16384, 3 * 16384 * 53248
    split, whole = (attention + feed_forward) // 8, 2 * 16384
    assert stage.parameters == 8 * (split + whole)
    assert stage.weight_bytes == pytest.approx(2 * stage.parameters, rel=1e-5)  # and padding of the buffers
    assert stage.gradient_bytes == 2 * stage.weight_bytes
    assert stage.optimizer_bytes == pytest.approx(12 * stage.parameters / 128, rel=1e-5)
    # Each parameter multiplies and adds once a token forward, twice backward; scores and their product with values.
    tokens, microbatches = 8192, found.microbatches
    attended = 4 * tokens * 16384 // 8
    assert stage.flops == pytest.approx(8 * microbatches * tokens * (6 * split + 3.5 * attended), rel=0.01)


def test_deepseek_v3_on_2048_gpus() -> None:
    # Three dense layers with the embedding, four to a stage, two with the output layer.
    layout = "transformer.pipeline_model_parallel_layout=Ettt|(tttt|)*14,ttL"
    found = planned("deepseek-v3", {"pp": 16, "ep": 64}, layout, world_size=2048, distributed_optimizer=True)
    assert found.parameters + found.buffers == 671_026_419_200  # as published, with the biases of 58 routers
    assert found.buffers == 58 * 256
    assert {traffic.group for stage in found.stages for traffic in stage.traffic} >= {"ep", "pp", "expt_dp"}


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("tiny", []),
        ("tiny", ["position_embedding_type=rope", "transformer.mtp_num_layers=1"]),
        ("tiny", ["share_embeddings_and_output_weights=true"]),
        ("moe-tiny", []),
        ("mla-tiny", []),
        ("t5-tiny", []),
    ],
)
def test_the_flops_of_a_model_by_its_shapes_are_those_counted(preset: str, overrides: list[str]) -> None:
    by_shapes, counted = flops_of(Document.load(preset, overrides))
    assert by_shapes == 3 * counted


def test_the_flops_of_a_state_space_model_leave_out_what_chunks_compute_beside() -> None:
    by_shapes, counted = flops_of(Document.load("mamba-tiny"))
    # In each of 4 layers and for each of 128 tokens in one chunk: scores of 4 groups over a state of 16, and their
    # product with 128 channels.
    beside = 4 * 128 * (2 * 128 * 4 * 16 + 2 * 128 * 128)
    assert by_shapes == 3 * (counted - beside)


def flops_of(document: Document) -> tuple[int, int]:
    """FLOPs of a step of one sample of 128 tokens by the shapes of parameters; those counted in the forward pass."""
    batch = Batch(seq_length=128, global_batch_size=1)
    job = BuildJob(document=document.data, wrapper=Wrapper.DDP)
    config = document.config()
    rank = measure(job, Layout(), batch, rank=0, memo={})
    shapes = {placement.full_name: placement.logical_shape(vocab_size(config)) for placement, _ in rank.placements}
    by_shapes = model_flops(shapes, make_builder(config).transformer_config, batch)
    return by_shapes, sum(chunk.work.forward_flops for chunk in rank.chunks)


def test_a_plan_by_memory_of_others_is_the_same() -> None:
    memo: Any = {}
    document = Document.load("hybrid-tiny")
    apply_layout(document, {"pp": 2})
    options = PlanOptions(batch=Batch(seq_length=32), world_size=4)
    first, again = (plan(document, options, memo=memo) for _ in range(2))
    assert again.stages == first.stages == plan(document, options).stages


def test_recomputing_keeps_less_and_computes_more() -> None:
    batch = Batch(seq_length=128, global_batch_size=8)
    usual = planned("tiny", {}, world_size=1, batch=batch).worst
    recomputed = planned("tiny", {}, *RECOMPUTED, world_size=1, batch=batch).worst
    assert recomputed.activation_bytes < usual.activation_bytes / 2
    (once,), (again,) = usual.chunks, recomputed.chunks
    logits = 2 * 128 * 64 * 256  # the output layer is not recomputed
    assert again.flops - once.flops == once.forward_flops - logits


def test_the_peak_is_that_of_the_schedule() -> None:
    # 1F1B: the first of four ranks keeps four microbatches, the last one.
    found = planned("tiny", {"pp": 4}, world_size=4, batch=Batch(seq_length=128, global_batch_size=16))
    kept = [stage.activation_bytes / stage.chunks[0].activation_bytes for stage in found.stages]
    assert kept == [4, 3, 2, 1]


@pytest.mark.parametrize("wrapper", [Wrapper.DDP, Wrapper.TORCH_FSDP2])
@pytest.mark.parametrize(
    ("stages", "sizes", "hidden_states"),
    [
        ("Ett|tt|mm|L", {"pp": 4}, [1, 2, 4, 3]),
        ("Ettt|tmm|L", {"pp": 3}, [1, 4, 3]),
        ("Et|t|t|t|||mm|L", {"pp": 4, "vp": 2}, [1 + 2, 2 + 2, 2 + 4, 2 + 3]),
        ("Ett|ttmm||L", {"pp": 4}, [1, 4, 6, 3]),
        ("Ett|tt|mmL", {"pp": 3}, [1, 2, 1]),
    ],
)
def test_predictions_on_a_stage_of_their_own(
    stages: str, sizes: dict[str, int], hidden_states: list[int], wrapper: Wrapper
) -> None:
    """The stage after them gets hidden states of the last layer and of each of two predictions."""
    changed = (
        "position_embedding_type=rope",
        "transformer.mtp_num_layers=2",
        f"transformer.pipeline_model_parallel_layout={stages}",
    )
    batch = Batch(seq_length=64, global_batch_size=8)
    found = planned("tiny", sizes, *changed, world_size=2 * sizes["pp"], wrapper=wrapper, batch=batch)
    whole = planned("tiny", {}, *changed[:2], world_size=1, batch=batch)
    assert found.parameters == whole.parameters
    assert sum(stage.flops for stage in found.stages) == whole.worst.flops / 2  # data parallelism takes half of it
    sent = [traffic.bytes for stage in found.stages for traffic in stage.traffic if traffic.group == "pp"]
    assert sent == [4 * (4 * 64 * 64) * times for times in hidden_states]  # microbatches of 64 tokens of 64 numbers


@pytest.mark.parametrize(
    ("preset", "sizes", "world_size", "says"),
    [
        ("tiny", {"tp": 3}, 3, r"num_attention_heads \(4\) must be a multiple of tensor_model_parallel_size \(3\)"),
        ("moe-tiny", {"ep": 3}, 3, "num_moe_experts = 4 is not a multiple of ep = 3"),
        ("tiny", {"tp": 2}, 3, "3"),
        ("t5-tiny", {"pp": 2}, 2, "T5 cannot be split into pipeline stages"),
    ],
)
def test_what_is_not_possible_is_refused(preset: str, sizes: dict[str, int], world_size: int, says: str) -> None:
    with pytest.raises(BridgeError, match=says):
        planned(preset, sizes, world_size=world_size)


@pytest.mark.parametrize("implementation", ["local", "transformer_engine", "full_iteration"])
def test_a_plan_counts_no_cuda_graphs(implementation: str) -> None:
    graphs = ("transformer.use_te_rng_tracker=true", f"transformer.cuda_graph_impl={implementation}")
    found, without = planned("tiny", {}, *graphs, world_size=1), planned("tiny", {}, world_size=1)
    assert found.stages == without.stages


def test_what_cannot_be_planned_is_refused() -> None:
    options = PlanOptions(batch=BATCH, world_size=4, wrapper=Wrapper.TORCH_FSDP2)
    with pytest.raises(PlanError, match="not torch-fsdp2, whose gathering"):
        search(Document.load("tiny"), options, Machine(), fixed={})
    with pytest.raises(PlanError, match="set it to alltoall"):
        planned("moe-tiny", {}, "transformer.moe_token_dispatcher_type=allgather", world_size=1)


# --- Search


def test_a_search_plans_every_layout_and_ranks_those_that_fit() -> None:
    document = Document.load("moe-tiny")
    limit = 4_000_000
    options = PlanOptions(
        batch=Batch(seq_length=64, global_batch_size=16), world_size=4, gpu_memory=limit, distributed_optimizer=True
    )
    watched: list[tuple[Candidate | str, int]] = []

    def watch(outcomes: Iterator[Candidate | str], total: int) -> Iterator[Candidate | str]:
        for outcome in outcomes:
            watched.append((outcome, total))
            yield outcome

    found = search(document, options, Machine(), fixed={"tp": 1}, processes=2, watch=watch)
    assert len(watched) == found.tried
    assert {total for _, total in watched} == {found.tried}
    assert found.tried == found.refused + found.too_large + len(found.candidates)
    assert found.too_large
    seconds = [candidate.seconds for candidate in found.candidates]
    assert seconds == sorted(seconds)
    for candidate in found.candidates:
        again = deepcopy(document)
        sizes = {axis: size for axis, size in candidate.plan.layout.items() if axis not in ("dp", "etp")}
        replace_layout(again, sizes, sequence_parallel=False)
        assert plan(again, options).stages == candidate.plan.stages
        assert candidate.plan.worst.total_bytes <= limit
        assert candidate.seconds == pytest.approx(sum(candidate.parts.values()))
    assert found.to_json()["kind"] == "search"
    why = found.why()
    assert why is not None
    assert why.startswith(f"{found.candidates[0].name} is ahead of {found.candidates[1].name}")
    with pytest.raises(PlanError, match=r"no layout of 4 GPUs fits"):
        search(document, replace(options, gpu_memory=1000), Machine(), fixed={"tp": 1, "pp": 1}, processes=1)
    odd = replace(options, batch=Batch(seq_length=64, global_batch_size=3))
    with pytest.raises(PlanError, match=r"0 too large\n\d+ are refused because the global batch of 3 samples does not"):
        search(document, odd, Machine(), fixed={"tp": 1, "pp": 1}, processes=1)


# --- The command


def bridge_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("bridge")), "plan", *arguments], capture_output=True, text=True
    )


def test_the_command(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    shown = bridge_plan("tiny", "--tp", "2", "--pp", "2", "--dp", "2", "--json", "--html", str(page))
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert (found["kind"], found["layers"]) == ("plan", "pytorch")
    assert found["world_size"] == 8
    assert found["parameters"] == 241_024
    assert [stage["pp"] for stage in found["stages"]] == [0, 1]
    assert {"weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes", "total_bytes", "flops"} < set(
        found["stages"][0]
    )
    assert "<svg" in page.read_text(encoding="utf-8")


def test_the_command_where_a_rank_does_not_fit() -> None:
    shown = bridge_plan("tiny", "--tp", "2", "--gpu-memory", "3MiB")
    assert shown.returncode == 1
    assert "does not fit" in " ".join(shown.stdout.split())
    assert "with --distributed-optimizer the worst rank holds" not in shown.stderr  # one data-parallel rank shares none
    assert "with transformer.sequence_parallel=true the worst rank holds" in shown.stderr


def test_the_command_refuses_nonsense() -> None:
    assert bridge_plan("tiny", "--tp", "0").returncode == 2
    assert bridge_plan("tiny", "--gpu-memory", "80 apples").returncode == 2
    assert "--search needs --gpus" in bridge_plan("tiny", "--search").stderr
    assert "--search takes neither" in bridge_plan("tiny", "--search", "--gpus", "2", "--html", "a.html").stderr
    refused = bridge_plan("tiny", "--tp", "3")
    assert refused.returncode == 1
    assert "num_attention_heads = 4 is not a multiple of tp = 3" in refused.stderr
