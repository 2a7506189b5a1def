"""A plan is what real processes hold: rank by rank, for models of every family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from megatron.core import parallel_state
from ranks import run_ranks

from bridge.config import Document, ModelConfig
from bridge.dist.batch import Batch
from bridge.dist.documents import replace_layout
from bridge.dist.job import BuildJob
from bridge.dist.layout import Layout
from bridge.dist.options import Wrapper
from bridge.dist.plan.groups import as_rank
from bridge.dist.plan.measure import measure

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
        document = Document.load(self.preset, list(self.overrides))
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

    parameters: list[tuple[str, tuple[int, ...]]]
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
    from bridge.dist.job import make_builder
    from bridge.dist.train import optimizer_of

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
        names: list[tuple[str, tuple[int, ...]]] = []

        def note(stages: list[Any]) -> list[Any]:
            names.extend((name, tuple(p.shape)) for stage in stages for name, p in stage.named_parameters())
            return stages

        config.pre_wrap_hooks.append(note)
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
            parameters=names,
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
                parameters=[(placement.name, tuple(placement.shape)) for placement, _ in planned.placements],
                weights=planned.weights,
                gradients=planned.gradients,
                master=planned.master,
                state=planned.state,
                buckets=planned.buckets,
                kept=None if not case.keeps_alike else [chunk.work.kept for chunk in planned.chunks],
            )
            == real[rank][name]
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

    found = {}
    for name, value in vars(parallel_state).items():
        if name.isupper() and "GLOO" not in name and ("GROUP" in name or "RANK" in name):
            if isinstance(value, torch.distributed.ProcessGroup):
                found[name] = (torch.distributed.get_process_group_ranks(value), value.rank(), value.size())
            elif value is None or isinstance(value, int | list):
                found[name] = value
    return found
